"""The image encoder: half precision where the work is, fp32 where errors add up."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from ip_adapter_trainer.encoders.clip import ClipEncoder
from ip_adapter_trainer.loading.encoder import load_encoder
from tests.tiny import FEATURES

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
    ours = ClipEncoder(model, Path("deep"), "deep").encode(PIXELS, (kind,))[kind]
    assert ours.dtype == torch.bfloat16
    assert (ours - exact).norm() < 0.5 * (plain(model, kind) - exact).norm()
    assert not any("forward" in vars(module) for module in model.modules())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_full_precision_features_are_the_plain_model_s_bit_for_bit(encoder_folder: Path) -> None:
    encoder = load_encoder(str(encoder_folder), features=FEATURES, dtype=torch.float32)
    found = encoder.encode(PIXELS, FEATURES)
    for kind in FEATURES:
        assert torch.equal(found[kind], plain(encoder.model, kind)) and torch.equal(
            found[kind], encoder.encode(PIXELS, (kind,))[kind]
        )


def test_preprocessing_travels_to_other_processes_without_weights(encoder_folder: Path) -> None:
    encoder = load_encoder(str(encoder_folder), features=FEATURES, dtype=torch.float32)
    image = Image.effect_noise((70, 50), 80).convert("RGB")
    sent = pickle.dumps(encoder.preprocess)
    assert len(sent) < 10_000 < sum(p.nbytes for p in encoder.model.parameters())
    assert torch.equal(pickle.loads(sent)(image), encoder.preprocess(image))


def test_the_last_layer_is_left_out_where_it_is_not_read(deep: CLIPVisionModelWithProjection) -> None:
    counted, own = {}, [set(vars(module)) for module in deep.modules()]
    for kind in FEATURES:
        with FlopCounterMode(display=False) as counter:
            ClipEncoder(deep, Path("deep"), "deep").encode(PIXELS, (kind,))
        counted[kind] = counter.get_total_flops()
    assert counted["penultimate"] == pytest.approx(counted["image_embeds"] * 31 / 32, rel=2e-3)
    assert [set(vars(module)) for module in deep.modules()] == own
