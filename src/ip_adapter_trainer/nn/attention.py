"""Decoupled cross-attention: text and image prompt attended to apart, by the same query, and added.

IP-Adapter (arXiv 2308.06721), equations 5 and 8::

    Z = Attention(Q, K, V) + scale * Attention(Q, K', V'),   K' = c_i W'_k,  V' = c_i W'_v
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MOST_EXPLICIT_KEYS = 256  # bf16, batch 4, one core with AMX: SDPA takes 1.6 times as long at 256, 0.66 at 1,024


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


def attend_lean(query: Tensor, key: Tensor, value: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """The same as `attend`, by single products where their backward pass is the faster one."""
    if not _explicit_wins(query, key, value):
        return attend(query, key, value, heads, mask)
    q, k, v = (split_heads(x, heads) for x in (query, key, value))
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # [B, heads, L, M]
    shares = (scores if mask is None else scores + mask).softmax(-1)
    return (shares @ v).transpose(1, 2).flatten(2)


def _explicit_wins(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """On a CPU over few keys: in bf16 always, in fp32 where keys and values are frozen and need no gradients.

    The fused kernel computes the gradients of all three whatever is asked for. Its forward pass was the faster one at
    nearly every size, so without gradients it stays.
    """
    if query.device.type != "cpu" or key.shape[1] > MOST_EXPLICIT_KEYS or not gradient_flows(query, key, value):
        return False
    return query.dtype != torch.float32 or not key.requires_grad


Attend = Callable[[Tensor, Tensor, Tensor, int, Tensor | None], Tensor]


@dataclass
class ImagePrompt:
    """What every adapted layer of one denoiser attends to; set before a forward pass.

    Without tokens, or at scale 0, each layer runs its original processor, so the base model is unchanged bit for bit.
    """

    tokens: Tensor | None = None  # [B, N, context_dim]
    scale: float = 1.0
    attend: Attend = attend  # how the layers compute an attention

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
    attend: Attend = attend,
) -> Tensor:
    """Equation 8 of the paper before the output projection.

    Args:
        query: [B, L, C].
        text: keys and values [B, M, C] of the text prompt.
        image: keys and values [B, N, C] of the image prompt.
        heads: number of attention heads.
        scale: weight of the image branch.
        mask: additive text mask [B, heads, 1 or L, M], or None.
        attend: computes one attention.
    """
    return attend(query, *text, heads, mask) + scale * attend(query, *image, heads, None)


class _Processor:
    """A diffusers attention processor that stands before the layer's original one.

    The names of the arguments are diffusers' own: it passes on to a processor only what it finds in its signature.
    """

    def __init__(self, original: Any) -> None:
        self.original = original

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Replaces the layer's attention [B, L, C] -> [B, L, C]; what is not taken here, the original computes."""
        if not self._takes(hidden_states, encoder_hidden_states, attention_mask):
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, temb, **kwargs)
        out = self._attended(attn, hidden_states, encoder_hidden_states, attention_mask)
        for layer in attn.to_out:
            out = layer(out)
        return out

    def _takes(self, hidden_states: Tensor, context: Tensor | None, mask: Tensor | None) -> bool:
        """Whether this processor computes the attention itself."""
        raise NotImplementedError

    def _attended(self, attn: Any, hidden_states: Tensor, context: Tensor | None, mask: Tensor | None) -> Tensor:
        """The attention [B, L, C] before the output projection."""
        raise NotImplementedError


class DecoupledProcessor(_Processor):
    """Decoupled cross-attention of one site; without an active image prompt, the original runs.

    It is no `nn.Module` on purpose: the trained weights belong to the adapter alone. Registering them in the UNet as
    well is what made the published script's checkpoints drop them as shared duplicates.
    """

    def __init__(self, pair: ImageKV, prompt: ImagePrompt, original: Any) -> None:
        super().__init__(original)
        self.pair, self.prompt = pair, prompt

    def _takes(self, hidden_states: Tensor, context: Tensor | None, mask: Tensor | None) -> bool:
        return self.prompt.active

    def _attended(self, attn: Any, hidden_states: Tensor, context: Tensor | None, mask: Tensor | None) -> Tensor:
        prompt = self.prompt
        assert context is not None and prompt.tokens is not None
        if attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)
        batch, length, _ = context.shape
        if mask is not None:
            mask = attn.prepare_attention_mask(mask, length, batch).view(batch, attn.heads, -1, length)
        text, image = (attn.to_k(context), attn.to_v(context)), self.pair(prompt.tokens)
        query = attn.to_q(hidden_states)
        return decoupled_attention(query, text, image, attn.heads, prompt.scale, mask, prompt.attend)


class LeanSelfProcessor(_Processor):
    """Frozen self-attention by `attend_lean` where gradients flow; else, and for anything unusual, the original."""

    def _takes(self, hidden_states: Tensor, context: Tensor | None, mask: Tensor | None) -> bool:
        return context is None and mask is None and hidden_states.ndim == 3 and gradient_flows(hidden_states)

    def _attended(self, attn: Any, hidden_states: Tensor, context: Tensor | None, mask: Tensor | None) -> Tensor:
        query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        return attend_lean(query, key, value, attn.heads)


@contextmanager
def lean_attention(net: nn.Module, prompt: ImagePrompt) -> Iterator[None]:
    """Lets a frozen net's self-attention and a prompt's adapted layers take `attend_lean` for a while."""
    layers: list[Any] = [layer for layer in net.modules() if _is_plain_self_attention(layer)]
    own = [(layer, layer.processor) for layer in layers]
    for layer, processor in own:
        layer.processor = LeanSelfProcessor(processor)
    before, prompt.attend = prompt.attend, attend_lean
    try:
        yield
    finally:
        prompt.attend = before
        for layer, processor in own:
            layer.processor = processor


def _is_plain_self_attention(layer: Any) -> bool:
    """Whether a layer is diffusers' self-attention between linear layers alone, as transformer blocks have it."""
    from diffusers.models.attention_processor import Attention, AttnProcessor2_0

    if type(layer) is not Attention or type(layer.processor) is not AttnProcessor2_0 or layer.is_cross_attention:
        return False
    norms = (layer.group_norm, layer.spatial_norm, layer.norm_q, layer.norm_k, layer.norm_cross)
    return all(not norm for norm in norms) and not layer.residual_connection and layer.rescale_output_factor == 1
