"""Pairs and low-rank deltas: FaceID's layout, on the queries, keys, values and outputs of every attention layer.

The deltas (LoRA, arXiv 2106.09685) change self-attention and text alike, and stay on at scale 0, as every reader keeps
them; without image tokens the base model runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from ip_adapter_trainer.core.errors import Problem
from ip_adapter_trainer.core.settings import Part, Resume
from ip_adapter_trainer.core.values import AttentionLayer
from ip_adapter_trainer.layouts._layout import LAYOUTS, Probe, Reader
from ip_adapter_trainer.layouts.unet import UNetLayout, attention_layers, demand_pairs

if TYPE_CHECKING:
    from torch import Tensor

    from ip_adapter_trainer.nn.attention import ImagePrompt

_DELTAS = tuple(f"to_{part}_lora.{side}.weight" for part in ("q", "k", "v", "out") for side in ("down", "up"))


class LoraConfig(Part):
    """Settings of the low-rank deltas."""

    resume = Resume(of_state="lora_rank")

    lora_rank: int = Field(128, gt=0, le=4096, description="Rank of the deltas on every attention layer.")


@LAYOUTS.register("unet_lora")
class UNetLoraLayout(UNetLayout):
    """`N.to_{q,k,v,out}_lora.{down,up}.weight` for every attention layer N, pairs for the odd ones."""

    Config = LoraConfig

    def layers(self, denoiser: Any) -> list[AttentionLayer]:
        """See `Layout.layers`."""
        return attention_layers(denoiser.net)

    def module(self, layer: AttentionLayer, token_dim: int, config: Part) -> Any:
        """See `Layout.module`."""
        from ip_adapter_trainer.nn.lora import LoraAttention

        assert isinstance(config, LoraConfig)
        return LoraAttention(layer.width, layer.context_dim, token_dim, config.lora_rank)

    def processor(self, layer: AttentionLayer, module: Any, prompt: ImagePrompt, original: Any) -> Any:
        """See `Layout.processor`."""
        from ip_adapter_trainer.nn.lora import LoraProcessor

        return LoraProcessor(module, prompt, original)

    def owns(self, layers: Mapping[str, tuple[int, ...]]) -> bool:
        """See `Layout.owns`."""
        return any("_lora." in name for name in layers)

    def demand(self, layers: Mapping[str, Tensor], where: str) -> None:
        """See `Layout.demand`: as `demand_pairs`, and every layer's eight deltas."""
        demand_pairs({name: tensor for name, tensor in layers.items() if "_lora." not in name}, where)
        numbers = sorted({name.split(".")[0] for name in layers}, key=int)
        lacking = [f"{n}.{delta}" for n in numbers for delta in _DELTAS if f"{n}.{delta}" not in layers]
        if lacking:
            raise Problem(f"ip_adapter.{lacking[0]} is missing", where=where, remedy="copy or download the file again")

    def settings(self, layers: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        """See `Layout.settings`."""
        return {"lora_rank": next(shape[0] for name, shape in layers.items() if name.endswith("_lora.down.weight"))}

    def refusals(self, layers: Mapping[str, tuple[int, ...]], context_dim: int) -> dict[Reader, str]:
        """See `Layout.refusals`."""
        why = "takes low-rank deltas for a FaceID adapter's"
        return {"original": why, "comfy": why}

    def verify(self, denoiser: Any, file: Path, probe: Probe) -> Tensor | None:
        """See `UNetLayout.verify`; without peft, diffusers would load the pairs alone and only warn."""
        if find_spec("peft") is None:
            remedy = "pip install 'ip_adapter_trainer[lora]', which its users need too"
            raise Problem("diffusers reads low-rank deltas with peft, which is not installed", remedy=remedy)
        return super().verify(denoiser, file, probe)

    def unload(self, pipeline: Any) -> None:
        """See `UNetLayout.unload`; `unload_ip_adapter` leaves the deltas in the UNet."""
        pipeline.unload_ip_adapter()
        pipeline.unload_lora_weights()
