"""The image encoder: half precision where the work is, fp32 where errors add up."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from ip_adapter_trainer.encoders.clip import FEATURES, ClipImageEncoder

PIXELS = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture
def deep() -> CLIPVisionModelWithProjection:
    """As deep as ViT-H/14 and narrow."""
    torch.manual_seed(0)
    table = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "projection_dim": 48}
    config = CLIPVisionConfig(num_hidden_layers=32, image_size=32, patch_size=8, hidden_act="gelu", **table)
    return CLIPVisionModelWithProjection(config).eval()


def plain(model: CLIPVisionModelWithProjection, kind: str) -> torch.Tensor:
    with torch.no_grad():
        output = model(PIXELS.to(model.dtype), output_hidden_states=True)
    return output.image_embeds if kind == "image_embeds" else output.hidden_states[-2]


@pytest.mark.parametrize("kind", FEATURES)
def test_half_precision_features_are_far_nearer_to_the_exact_ones_than_the_plain_model_s(
    deep: CLIPVisionModelWithProjection, kind: str
) -> None:
    exact = plain(deep, kind)
    model = deep.to(torch.bfloat16)
    classes = [type(m) for m in model.modules()]
    ours = ClipImageEncoder(model, "deep").encode(PIXELS, kind)  # type: ignore[arg-type]
    assert ours.dtype == torch.bfloat16
    assert (ours - exact).norm() < 0.5 * (plain(model, kind) - exact).norm()
    assert [type(m) for m in model.modules()] == classes
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_full_precision_features_are_the_plain_model_s(encoder_folder: Path) -> None:
    encoder = ClipImageEncoder.load(str(encoder_folder), dtype=torch.float32)
    classes = [type(m) for m in encoder.model.modules()]
    found = encoder.encode_each(PIXELS, FEATURES)
    assert torch.equal(found["penultimate"], plain(encoder.model, "penultimate"))
    torch.testing.assert_close(found["image_embeds"], plain(encoder.model, "image_embeds"), rtol=1e-5, atol=1e-6)
    assert all(torch.equal(encoder.encode(PIXELS, kind), found[kind]) for kind in FEATURES)
    assert [type(m) for m in encoder.model.modules()] == classes


def test_of_the_last_layer_only_what_is_read_is_computed(deep: CLIPVisionModelWithProjection) -> None:
    counted = {}
    for kinds in [("penultimate",), ("image_embeds",), FEATURES, ()]:
        with FlopCounterMode(display=False) as counter:
            ClipImageEncoder(deep, "deep").encode_each(PIXELS, kinds) if kinds else plain(deep, "image_embeds")
        counted[kinds] = counter.get_total_flops()
    layer = counted[()] / 32
    assert counted["penultimate",] < counted[()] - 0.98 * layer
    assert counted["image_embeds",] == counted[FEATURES] < counted[()] - 0.6 * layer
