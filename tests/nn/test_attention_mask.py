"""A text mask that a caller gives to the denoiser reaches the text branch of an adapted layer, and it alone."""

from __future__ import annotations

import torch
from diffusers.models.attention_processor import Attention

from ip_adapter_trainer.nn.attention import DecoupledProcessor, ImageKV, ImagePrompt


def layer_and_prompt() -> tuple[Attention, ImagePrompt]:
    torch.manual_seed(0)
    layer = Attention(query_dim=16, cross_attention_dim=12, heads=2, dim_head=8)
    prompt = ImagePrompt(tokens=torch.randn(2, 4, 12))
    pair = ImageKV(12, 16)
    torch.nn.init.zeros_(pair.to_v_ip.weight)  # the image branch adds nothing
    layer.set_processor(DecoupledProcessor(pair, prompt, layer.processor))
    return layer, prompt


def test_the_text_mask_hides_the_tokens_it_hides_in_the_stock_layer() -> None:
    layer, prompt = layer_and_prompt()
    hidden, context = torch.randn(2, 5, 16), torch.randn(2, 7, 12)
    mask = torch.where(torch.arange(7) < 4, 0.0, -10000.0).expand(2, 1, 7)
    with torch.no_grad():
        adapted = layer(hidden, context, attention_mask=mask)
        prompt.scale = 0.0
        stock, unmasked = layer(hidden, context, attention_mask=mask), layer(hidden, context)
        shorter = layer(hidden, context[:, :4])
    torch.testing.assert_close(adapted, stock, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(stock, shorter, rtol=1e-5, atol=1e-6)
    assert (stock - unmasked).abs().max() > 1e-3
