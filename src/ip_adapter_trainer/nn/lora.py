"""Low-rank deltas of attention layers (LoRA, arXiv 2106.09685), as FaceID adapters have them."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ip_adapter_trainer.nn.attention import DecoupledProcessor, ImageKV, attend, prepared_mask


class LowRank(nn.Module):
    """W_up W_down x; zero at first, at scale 1."""

    def __init__(self, in_dim: int, out_dim: int, rank: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(in_dim, rank, bias=False), nn.Linear(rank, out_dim, bias=False)
        nn.init.normal_(self.down.weight, std=1 / rank)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., I] to [..., O], in the dtype of the input; the weights are fp32 masters."""
        return F.linear(F.linear(x, self.down.weight.to(x.dtype)), self.up.weight.to(x.dtype))


class LoraAttention(ImageKV):
    """The deltas of one attention layer and, where it reads another sequence, the pair for image tokens."""

    def __init__(self, width: int, context_dim: int | None, token_dim: int, rank: int) -> None:
        super().__init__(token_dim, width)
        self.is_cross = context_dim is not None
        if not self.is_cross:
            del self.to_k_ip, self.to_v_ip
        self.to_q_lora, self.to_out_lora = LowRank(width, width, rank), LowRank(width, width, rank)
        read_dim = width if context_dim is None else context_dim
        self.to_k_lora, self.to_v_lora = LowRank(read_dim, width, rank), LowRank(read_dim, width, rank)

    def start_from(self, attention: Any) -> None:
        """Begin with the layer's own keys and values of text; deltas begin at zero."""
        if self.is_cross:
            super().start_from(attention)


class LoraProcessor(DecoupledProcessor):
    """Decoupled attention with deltas; the query of the image branch has its delta too, as in the published code."""

    @property
    def is_active(self) -> bool:
        """True with image tokens, at scale 0 too: readers keep the deltas on."""
        return self.prompt.tokens is not None

    def attended(self, attn: Any, hidden_states: Tensor, context: Tensor | None, mask: Tensor | None) -> Tensor:
        """Return the layer's output [B, L, C] by self-attention or decoupled attention, each with its deltas."""
        deltas, prompt, x = self.module, self.prompt, hidden_states
        context = x if context is None else context
        mask = prepared_mask(attn, mask, context)
        query = attn.to_q(x) + deltas.to_q_lora(x)
        key = attn.to_k(context) + deltas.to_k_lora(context)
        value = attn.to_v(context) + deltas.to_v_lora(context)
        out = attend(query, key, value, attn.heads, mask)
        if deltas.is_cross and prompt.scale:
            assert prompt.tokens is not None
            image_key, image_value = deltas(prompt.tokens)
            out = out + prompt.scale * attend(query, image_key, image_value, attn.heads)
        return attn.to_out[1](attn.to_out[0](out) + deltas.to_out_lora(out))
