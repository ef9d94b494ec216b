"""A layout: a key/value pair and a learned gate at every cross-attention layer of a UNet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ip_adapter_trainer.core.settings import Part
from ip_adapter_trainer.core.values import AttentionLayer
from ip_adapter_trainer.layouts import LAYOUTS, Layout
from ip_adapter_trainer.layouts.unet import attention_layers
from ip_adapter_trainer.nn.attention import DecoupledProcessor, ImageKV, ImagePrompt


class GatedKV(ImageKV):
    """A pair whose values are multiplied by a gate, which begins at one."""

    def __init__(self, token_dim: int, width: int) -> None:
        super().__init__(token_dim, width)
        self.gate = nn.Parameter(torch.ones(1))

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, N, C] of tokens [B, N, D]."""
        key, value = super().forward(tokens)
        return key, value * self.gate.to(value.dtype)


@LAYOUTS.register("gated")
class GatedLayout(Layout):
    """`N.to_k_ip.weight`, `N.to_v_ip.weight` and `N.gate`, which this package alone reads."""

    families = ("sd", "sdxl")

    def layers(self, denoiser: Any) -> list[AttentionLayer]:
        """See `Layout.layers`."""
        return [layer for layer in attention_layers(denoiser.net) if layer.kind == "cross"]

    def module(self, layer: AttentionLayer, token_dim: int, config: Part) -> Any:
        """See `Layout.module`."""
        return GatedKV(token_dim, layer.width)

    def processor(self, layer: AttentionLayer, module: Any, prompt: ImagePrompt, original: Any) -> Any:
        """See `Layout.processor`."""
        return DecoupledProcessor(module, prompt, original)

    def owns(self, layers: Mapping[str, tuple[int, ...]]) -> bool:
        """See `Layout.owns`."""
        return any(name.endswith(".gate") for name in layers)
