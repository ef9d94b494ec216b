"""The CLIP image encoder (arXiv 2103.00020).

Preprocessing and the "no picture" feature follow what diffusers does at inference, because an adapter must see in
training what its users will feed it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ip_adapter_trainer.encoders._encoder import ENCODERS, ImageEncoder
from ip_adapter_trainer.nn.forwards import forwards_replaced

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import CLIPVisionModelWithProjection


def _exact_norm(norm: nn.LayerNorm, input: Tensor) -> Tensor:
    """Norm the residual stream [B, T, E] and leave it in fp32."""
    return F.layer_norm(input.float(), norm.normalized_shape, norm.weight.float(), norm.bias.float(), norm.eps)


def _inner_norm(norm: nn.LayerNorm, input: Tensor) -> Tensor:
    """Norm [B, T, E] for a layer's products, which are in the weights' dtype."""
    return _exact_norm(norm, input).to(norm.weight.dtype)


def _exact_linear(linear: nn.Linear, input: Tensor) -> Tensor:
    """Multiply [B, E] by the weight in fp32, to [B, D]."""
    return F.linear(input.float(), linear.weight.float())


def _unread(hidden: Tensor, mask: None = None, **options: Any) -> Tensor:
    """Stand for a last layer of which nothing is read."""
    return hidden


def _exact_stream(model: CLIPVisionModelWithProjection) -> AbstractContextManager[None]:
    """Let a half precision encoder keep its residual stream, norms and projection in fp32 for a while.

    The adapter's gradients are proportional to the features, so their rounding is the gradients' own. ViT-H/14's depth
    and half its width in bf16: features 1.4e-2 off those in fp32, so 4.0e-3, for 2.5 % more time on one core.
    """
    if model.dtype == torch.float32:
        return nullcontext()
    vision = model.vision_model
    inner = [norm for layer in vision.encoder.layers for norm in (layer.layer_norm1, layer.layer_norm2)]
    forwards = [(norm, partial(_inner_norm, norm)) for norm in inner]
    forwards += [(norm, partial(_exact_norm, norm)) for norm in (vision.pre_layrnorm, vision.post_layernorm)]
    return forwards_replaced([*forwards, (model.visual_projection, partial(_exact_linear, model.visual_projection))])


@ENCODERS.register("clip")
class ClipEncoder(ImageEncoder):
    """A frozen `CLIPVisionModelWithProjection` of any size: CLS and every patch, and the projected embedding."""

    known_as = ("clip_vision_model", "clip")
    model_class = "CLIPVisionModelWithProjection"
    spare = r"^(text_model|text_projection)\."

    def make_preprocess(self, folder: Path) -> Any:
        """See `ImageEncoder.make_preprocess`; whatever the folder says, as diffusers makes it for any encoder.

        Short side to S (bicubic), centre crop, CLIP's mean and deviation.
        """
        from transformers import CLIPImageProcessorPil

        side_px = int(self.model.config.image_size)
        return CLIPImageProcessorPil(size={"shortest_edge": side_px}, crop_size=side_px)

    @property
    def features(self) -> Mapping[str, tuple[int, ...]]:
        """See `ImageEncoder.features`."""
        config = self.model.config
        width, embed = int(config.hidden_size), int(config.projection_dim)
        return {"image_embeds": (embed,), "penultimate": (1 + self.patches, width)}

    @property
    def last_layer(self) -> nn.Module:
        """See `ImageEncoder.last_layer`."""
        return self.model.vision_model.encoder.layers[-1]

    def embeds(self, output: Any) -> Tensor:
        """See `ImageEncoder.embeds`."""
        return output.image_embeds

    def run(self, pixels: Tensor, names: Sequence[str]) -> Any:
        """See `ImageEncoder.run`; the residual stream in fp32, and no last layer where nothing of it is read."""
        unread = [] if "image_embeds" in names else [(self.last_layer, _unread)]
        with forwards_replaced(unread), _exact_stream(self.model):
            return self.model(pixels)

    @classmethod
    def unread(cls, settings: Mapping[str, Any], names: Sequence[str], features: Sequence[str]) -> str | None:
        """See `ImageEncoder.unread`: the projection, and the norm before it.

        The last layer may be left out only together with that norm: otherwise config.json has a layer too many.
        """
        if "image_embeds" in features:
            return None
        unread = ["visual_projection", r"vision_model\.post_layernorm"]
        vision = settings.get("vision_config") or settings
        layers = vision.get("num_hidden_layers", 12) if isinstance(vision, dict) else None
        if isinstance(layers, int) and not any("post_layernorm" in name for name in names):
            unread.append(rf"vision_model\.encoder\.layers\.{layers - 1}")
        return rf"^({'|'.join(unread)})\."
