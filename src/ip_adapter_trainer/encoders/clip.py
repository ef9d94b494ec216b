"""The CLIP image encoder, its preprocessing and its two kinds of feature.

Preprocessing and the "no picture" feature follow what diffusers does at inference, because an adapter must see in
training what its users will feed it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ip_adapter_trainer.nn.forwards import forwards_replaced

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import CLIPVisionModelWithProjection

FeatureKind = Literal["image_embeds", "penultimate"]
FEATURES: tuple[FeatureKind, ...] = ("image_embeds", "penultimate")


class ClipPreprocess:
    """RGB picture to normalised pixels [3, S, S]: short side to S (bicubic), centre crop, CLIP mean and deviation.

    The same as `CLIPImageProcessor(size=S, crop_size=S)`, which is what diffusers makes for any encoder.
    """

    def __init__(self, side_px: int) -> None:
        from transformers import CLIPImageProcessorPil

        self.side_px = side_px
        self._processor = CLIPImageProcessorPil(size={"shortest_edge": side_px}, crop_size=side_px)

    def __call__(self, image: Image) -> Tensor:
        """One RGB picture to [3, S, S]."""
        pixels = self._processor(images=image, return_tensors="np")["pixel_values"][0]
        return torch.from_numpy(np.ascontiguousarray(pixels, dtype=np.float32))


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


class ClipImageEncoder:
    """A frozen `CLIPVisionModelWithProjection` of any size.

    Attributes:
        name: folder or hub id that it came from.
        is_mended: whether its weights have other names there, with which other programs do not find them.
        side_px: input side S of the encoder.
        preprocess: RGB picture to [3, S, S].
    """

    def __init__(self, model: CLIPVisionModelWithProjection, name: str, is_mended: bool = False) -> None:
        self.model, self.name, self.is_mended = model.eval().requires_grad_(False), name, is_mended
        self.side_px = int(model.config.image_size)
        self.preprocess = ClipPreprocess(self.side_px)
        self._null: dict[FeatureKind, Tensor] = {}
        self._is_released = False

    @property
    def config(self) -> Any:
        """The vision model's own config."""
        return self.model.config

    def width(self, kind: FeatureKind) -> int:
        """Last dimension of a feature: the projection for `image_embeds`, the hidden size for `penultimate`."""
        return int(self.config.projection_dim if kind == "image_embeds" else self.config.hidden_size)

    def length(self, kind: FeatureKind) -> int:
        """Number of feature vectors of one picture: 1, or CLS and every patch."""
        return 1 if kind == "image_embeds" else (self.side_px // int(self.config.patch_size)) ** 2 + 1

    def encode(self, pixels: Tensor, kind: FeatureKind) -> Tensor:
        """Features of preprocessed pixels [B, 3, S, S]: [B, E] for `image_embeds`, [B, T, E] for `penultimate`."""
        return self.encode_each(pixels, (kind,))[kind]

    @torch.no_grad()
    def encode_each(self, pixels: Tensor, kinds: Sequence[FeatureKind]) -> dict[str, Tensor]:
        """Several kinds of feature of the same pixels, by one pass; see `encode`."""
        assert not self._is_released, "the encoder's weights are gone"
        dtype, last = self.model.dtype, self.model.vision_model.encoder.layers[-1]
        unread = [] if "image_embeds" in kinds else [(last, _unread)]
        penultimate: list[Tensor] = []
        listening = last.register_forward_pre_hook(lambda _, given: penultimate.append(given[0]))
        with listening, forwards_replaced(unread), _exact_stream(self.model):
            output = self.model(pixels.to(self.model.device, dtype))
        found = {"penultimate": penultimate[0], "image_embeds": output.image_embeds}
        return {kind: found[kind].to(dtype) for kind in kinds}

    def null(self, kind: FeatureKind) -> Tensor:
        """The feature that loaders feed as "no picture", with a batch of one.

        Zeros for `image_embeds`; for `penultimate` the encoding of all-zero pixels, zero after normalisation.
        """
        if kind not in self._null:
            if kind == "image_embeds":
                value = torch.zeros(1, self.width(kind), dtype=self.model.dtype, device=self.model.device)
            else:
                value = self.encode(torch.zeros(1, 3, self.side_px, self.side_px), kind)
            self._null[kind] = value
        return self._null[kind]

    def release(self, kind: FeatureKind) -> None:
        """Lets go of the weights and remembers one kind of "no picture": where all features are there already."""
        self.null(kind)
        self.model.to("meta")
        self._is_released = True
