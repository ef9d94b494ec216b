"""This package's layout for base models that no other reader knows: a pair at every layer where an image meets text.

Keys are those of the published layout; which layers the numbers stand for, the base model's denoiser says.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ip_adapter_trainer.core.settings import Part
from ip_adapter_trainer.core.values import AttentionLayer
from ip_adapter_trainer.layouts._layout import LAYOUTS, Layout

if TYPE_CHECKING:
    from ip_adapter_trainer.nn.attention import ImagePrompt


@LAYOUTS.register("own")
class OwnLayout(Layout):
    """A pair at every layer that the denoiser names in `attention`."""

    def layers(self, denoiser: Any) -> list[AttentionLayer]:
        """See `Layout.layers`: the modules whose names end as one of `denoiser.attention` does, in module order."""
        found = [
            (name, module, kind)
            for name, module in denoiser.net.named_modules()
            for ending, kind in denoiser.attention.items()
            if name.endswith(ending) and hasattr(module, "processor")
        ]
        return [
            AttentionLayer(number, name, kind, module.to_q.out_features, module.heads, denoiser.context_dim)
            for number, (name, module, kind) in enumerate(found)
        ]

    def module(self, layer: AttentionLayer, token_dim: int, config: Part) -> Any:
        """See `Layout.module`."""
        from ip_adapter_trainer.nn.attention import AddedKV

        return AddedKV(token_dim, layer.width)

    def processor(self, layer: AttentionLayer, module: Any, prompt: ImagePrompt, original: Any) -> Any:
        """See `Layout.processor`."""
        from ip_adapter_trainer.nn.attention import AddedProcessor

        return AddedProcessor(module, prompt, original)

    def owns(self, layers: Mapping[str, tuple[int, ...]]) -> bool:
        """See `Layout.owns`; by the card alone, since the keys are the published ones."""
        return False
