"""Low-rank deltas of attention layers (LoRA, arXiv 2106.09685), as FaceID adapters have them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ip_adapter_trainer.nn.attention import ImageKV, ImagePrompt, attend, prepared_mask


class LowRank(nn.Module):
    """W_up W_down x; zero at first, at scale 1."""

    def __init__(self, in_dim: int, out_dim: int, rank: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(in_dim, rank, bias=False), nn.Linear(rank, out_dim, bias=False)
        nn.init.normal_(self.down.weight, std=1 / rank)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] to [..., O], in the dtype of the input; the weights are fp32 masters."""
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

    @torch.no_grad()
    def silence(self) -> None:
        """Set the pair and the deltas to zero."""
        for parameter in self.parameters():
            parameter.zero_()


class LoraProcessor:
    """A diffusers attention processor with deltas and decoupled attention; without image tokens, the original runs.

    The query of the image branch has its delta too, as in the published FaceID code.
    """

    def __init__(self, module: LoraAttention, prompt: ImagePrompt, original: Any) -> None:
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
        """Attention [B, L, C] -> [B, L, C]."""
        deltas, prompt, x = self.module, self.prompt, hidden_states
        if prompt.tokens is None:
            return self.original(attn, x, encoder_hidden_states, attention_mask, temb, **kwargs)
        context = x if encoder_hidden_states is None else encoder_hidden_states
        mask = prepared_mask(attn, attention_mask, context)
        query = attn.to_q(x) + deltas.to_q_lora(x)
        key = attn.to_k(context) + deltas.to_k_lora(context)
        value = attn.to_v(context) + deltas.to_v_lora(context)
        out = attend(query, key, value, attn.heads, mask)
        if deltas.is_cross and prompt.scale:
            image_key, image_value = deltas(prompt.tokens)
            out = out + prompt.scale * attend(query, image_key, image_value, attn.heads)
        return attn.to_out[1](attn.to_out[0](out) + deltas.to_out_lora(out))
