"""Decoupled cross-attention: text and image prompt attended to apart, by the same query, and added.

IP-Adapter (arXiv 2308.06721), equations 5 and 8::

    Z = Attention(Q, K, V) + scale * Attention(Q, K', V'),   K' = c_i W'_k,  V' = c_i W'_v
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def gradient_flows(*inputs: Tensor) -> bool:
    """Whether a backward pass will ask for the gradient of any of these."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in inputs)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, L, heads * D] to [B, heads, L, D]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """Multi-head attention of [B, L, C] over [B, M, C], giving [B, L, C]."""
    q, k, v = (split_heads(x, heads) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


@dataclass
class ImagePrompt:
    """What every adapted layer of one denoiser attends to; set before a forward pass.

    Without tokens, or at scale 0, each layer runs its original processor, so the base model is unchanged bit for bit.
    """

    tokens: Tensor | None = None  # [B, N, context_dim]
    scale: float = 1.0

    @property
    def active(self) -> bool:
        """Whether the image prompt takes part at all."""
        return self.tokens is not None and self.scale != 0.0


class ImageKV(nn.Module):
    """The trained pair of one layer, under its published names `to_k_ip` and `to_v_ip` (no biases)."""

    def __init__(self, context_dim: int, width: int) -> None:
        super().__init__()
        self.to_k_ip = nn.Linear(context_dim, width, bias=False)
        self.to_v_ip = nn.Linear(context_dim, width, bias=False)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, N, width] of image tokens [B, N, context_dim], in the tokens' dtype.

        The fp32 master weights are cast here, once a step, so the frozen layers around need no autocast.
        """
        weights = (self.to_k_ip.weight, self.to_v_ip.weight)
        key, value = (F.linear(tokens, weight.to(tokens.dtype)) for weight in weights)
        return key, value


def decoupled_attention(
    query: Tensor,
    text: tuple[Tensor, Tensor],
    image: tuple[Tensor, Tensor],
    heads: int,
    scale: float,
    mask: Tensor | None,
) -> Tensor:
    """Equation 8 of the paper before the output projection.

    Args:
        query: [B, L, C].
        text: keys and values [B, M, C] of the text prompt.
        image: keys and values [B, N, C] of the image prompt.
        heads: number of attention heads.
        scale: weight of the image branch.
        mask: additive text mask [B, heads, 1 or L, M], or None.
    """
    return attend(query, *text, heads, mask) + scale * attend(query, *image, heads, None)


class DecoupledProcessor:
    """Decoupled cross-attention of one site; without an active image prompt, the layer's original processor runs.

    It is no `nn.Module` on purpose: the trained weights belong to the adapter alone. Registering them in the UNet as
    well is what made the published script's checkpoints drop them as shared duplicates. The names of the arguments are
    diffusers' own: it passes on to a processor only what it finds in its signature.
    """

    def __init__(self, pair: ImageKV, prompt: ImagePrompt, original: Any) -> None:
        self.pair, self.prompt, self.original = pair, prompt, original

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Replace the layer's attention [B, L, C] -> [B, L, C]."""
        if not self.prompt.active:
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, temb, **kwargs)
        out = self._attended(attn, hidden_states, encoder_hidden_states, attention_mask)
        for layer in attn.to_out:
            out = layer(out)
        return out

    def _attended(self, attn: Any, hidden_states: Tensor, context: Tensor | None, mask: Tensor | None) -> Tensor:
        """Return the attention [B, L, C] before the output projection."""
        prompt = self.prompt
        assert context is not None and prompt.tokens is not None
        if attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)
        batch, length, _ = context.shape
        if mask is not None:
            mask = attn.prepare_attention_mask(mask, length, batch).view(batch, attn.heads, -1, length)
        text, image = (attn.to_k(context), attn.to_v(context)), self.pair(prompt.tokens)
        query = attn.to_q(hidden_states)
        return decoupled_attention(query, text, image, attn.heads, prompt.scale, mask)
