"""Decoupled cross-attention: one query attends to text and image prompt separately, and the results are added.

IP-Adapter (arXiv 2308.06721), equations 5 and 8::

    Z = Attention(Q, K, V) + scale * Attention(Q, K', V'),   K' = c_i W'_k,  V' = c_i W'_v
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def gradient_flows(*inputs: Tensor) -> bool:
    """Return whether a backward pass will ask for the gradient of any of these tensors [...]."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in inputs)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """Split [B, L, heads * D] into [B, heads, L, D]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """Return multi-head attention [B, L, C] of queries [B, L, C] over keys and values [B, M, C]."""
    q, k, v = (split_heads(x, heads) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


@dataclass
class ImagePrompt:
    """The image prompt that all adapted layers of one denoiser attend to; set before a forward pass.

    Without tokens, or at scale 0, each layer runs its original processor, so the base model is unchanged bit for bit.
    """

    tokens: Tensor | None = None  # [B, N, D]
    scale: float = 1.0
    time_embedding: Tensor | None = None  # [B, E], where tokens depend on the time
    features: Any = None  # the tokens' source at every forward pass, where they depend on the time

    @property
    def active(self) -> bool:
        """True if the layers attend to the image prompt at all."""
        return self.tokens is not None and self.scale != 0.0

    def clear(self) -> None:
        """Remove tokens and features, so that only the base model runs."""
        self.tokens = self.time_embedding = self.features = None


class ImageKV(nn.Module):
    """The trained key and value projections of one layer, by their published names `to_k_ip`, `to_v_ip` (no biases)."""

    def __init__(self, token_dim: int, width: int) -> None:
        super().__init__()
        self.to_k_ip = nn.Linear(token_dim, width, bias=False)
        self.to_v_ip = nn.Linear(token_dim, width, bias=False)

    @torch.no_grad()
    def start_from(self, attention: Any) -> None:
        """Copy the weights of the text's projections: "to speed up the convergence" (paper, section 3.2.2)."""
        self.to_k_ip.weight.copy_(attention.to_k.weight)
        self.to_v_ip.weight.copy_(attention.to_v.weight)

    @torch.no_grad()
    def silence(self) -> None:
        """Set both weights to zeros: loaders demand that files hold them, and zeros add exactly nothing."""
        for weight in self.parameters():
            weight.zero_()

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values [B, N, width] of image tokens [B, N, D], in the tokens' dtype.

        The fp32 master weights are cast here, so that the frozen layers around need no autocast.
        """
        weights = (self.to_k_ip.weight, self.to_v_ip.weight)
        key, value = (F.linear(tokens, weight.to(tokens.dtype)) for weight in weights)
        return key, value


def prepared_mask(attn: Any, mask: Tensor | None, context: Tensor) -> Tensor | None:
    """Return a diffusers layer's additive mask [B, heads, 1 or L, M] for a context [B, M, D]; None without one."""
    if mask is None:
        return None
    batch, length, _ = context.shape
    return attn.prepare_attention_mask(mask, length, batch).view(batch, attn.heads, -1, length)


def decoupled_attention(
    query: Tensor,
    text: tuple[Tensor, Tensor],
    image: tuple[Tensor, Tensor],
    heads: int,
    scale: float,
    mask: Tensor | None,
) -> Tensor:
    """Return equation 8 of the paper, [B, L, C], before the output projection, for a query [B, L, C].

    Keys and values are [B, M, C] of the text, [B, N, C] of the image; the mask [B, heads, 1 or L, M] is the text's.
    """
    return attend(query, *text, heads, mask) + scale * attend(query, *image, heads, None)


class DecoupledProcessor:
    """Decoupled cross-attention of one layer; without an active image prompt, the layer's original processor runs.

    It is no `nn.Module` on purpose: the trained weights belong to the adapter alone. Registering them in the UNet as
    well is what made the published script's checkpoints drop them as shared duplicates. The names of the arguments are
    diffusers' own: it passes on to a processor only what it finds in its signature.
    """

    def __init__(self, module: Any, prompt: ImagePrompt, original: Any) -> None:
        self.module, self.prompt, self.original = module, prompt, original

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Return the layer's output [B, L, C] for hidden states [B, L, C]."""
        if not self.is_active:
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, temb, **kwargs)
        return self.attended(attn, hidden_states, encoder_hidden_states, attention_mask)

    @property
    def is_active(self) -> bool:
        """True if the layer's own processor does not run alone."""
        return self.prompt.active

    def attended(self, attn: Any, hidden_states: Tensor, context: Tensor | None, mask: Tensor | None) -> Tensor:
        """Return the layer's output [B, L, C] by decoupled attention."""
        prompt = self.prompt
        assert context is not None and prompt.tokens is not None
        if attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)
        text, image = (attn.to_k(context), attn.to_v(context)), self.module(prompt.tokens)
        query = attn.to_q(hidden_states)
        out = decoupled_attention(query, text, image, attn.heads, prompt.scale, prepared_mask(attn, mask, context))
        for layer in attn.to_out:
            out = layer(out)
        return out


class AddedKV(ImageKV):
    """An `ImageKV` whose values start at zero, so that a run starts from the base model, bit for bit."""

    @torch.no_grad()
    def start_from(self, attention: Any) -> None:
        """Copy the layer's key weights, the text's first, if any have this shape; set the value weights to zero."""
        for name in ("add_k_proj", "to_k"):
            weight = getattr(getattr(attention, name, None), "weight", None)
            if weight is not None and weight.shape == self.to_k_ip.weight.shape:
                self.to_k_ip.weight.copy_(weight)
                break
        self.to_v_ip.weight.zero_()


class AddedProcessor:
    """Attention over image tokens, added to the output of a layer's own processor, for layers of any denoiser.

    The query is the layer's own, normalised as there, before any position is encoded; the result goes through the
    layer's output projection without its bias. If the layer returns several sequences, the latents' is the first.
    """

    def __init__(self, pair: ImageKV, prompt: ImagePrompt, original: Any) -> None:
        self.pair, self.prompt, self.original = pair, prompt, original
        # diffusers passes on only what it finds in a processor's signature: this one has the original's.
        self.__call__ = wraps(original.__call__)(partial(AddedProcessor.__call__, self))  # type: ignore[method-assign]

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return the layer's own output, with the attention [B, L, C] added to its first or only sequence."""
        out, prompt = self.original(attn, hidden_states, *args, **kwargs), self.prompt
        if not prompt.active:
            return out
        assert prompt.tokens is not None
        key, value = self.pair(prompt.tokens)
        attended = attend(_normed_query(attn, hidden_states), key, value, attn.heads)
        project: Any = attn.to_out[0] if isinstance(attn.to_out, nn.ModuleList) else attn.to_out
        added = prompt.scale * F.linear(attended, project.weight)
        return (out[0] + added, *out[1:]) if isinstance(out, tuple) else out + added


def _normed_query(attn: Any, hidden_states: Tensor) -> Tensor:
    """Return the query [B, L, C], normalised by head or as a whole if the layer has such a norm."""
    query, norm = attn.to_q(hidden_states), getattr(attn, "norm_q", None)
    if norm is None:
        return query
    is_whole = getattr(norm, "weight", None) is not None and norm.weight.shape[-1] == query.shape[-1]
    return norm(query) if is_whole else norm(query.unflatten(-1, (attn.heads, -1))).flatten(2)
