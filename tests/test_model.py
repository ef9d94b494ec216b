"""The laws of attaching an adapter, on every family and variant."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from ip_adapter_trainer.adapters import VARIANTS
from ip_adapter_trainer.core.errors import Problem
from ip_adapter_trainer.core.values import Geometry, TextCondition
from ip_adapter_trainer.encoders import FEATURES
from ip_adapter_trainer.loading.base import load_base
from ip_adapter_trainer.loading.encoder import load_encoder
from ip_adapter_trainer.model import Model
from tests import tiny

GEOMETRY = Geometry((32, 32), (0, 0), (32, 32))


def build(base: Path, encoder: Path, variant: str, **config: int) -> Model:
    family = load_base(str(base), dtype=torch.float32, device="cpu")
    kind = VARIANTS[variant]
    return Model(family, load_encoder(str(encoder), kinds=FEATURES, dtype=torch.float32), kind, kind.Config(**config))


@pytest.fixture(params=[(b, v) for b in tiny.BASES for v in ("base", "plus", "full")], ids="-".join)
def model(request: pytest.FixtureRequest, base_folder: Callable, encoder_folder: Path) -> Iterator[Model]:
    torch.manual_seed(0)
    base, variant = request.param
    yield build(base_folder(base), encoder_folder, variant)


def inputs(model: Model, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor, TextCondition, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    noisy = torch.randn(batch, 4, 8, 8, generator=generator)
    text = model.family.encode_text(["a red star", ""][:batch], [GEOMETRY] * batch)
    return noisy, torch.tensor([10, 900][:batch]), text, torch.randn(batch, 3, 32, 32, generator=generator)


def test_scale_zero_and_no_tokens_are_the_base_bit_for_bit(model: Model) -> None:
    noisy, t, text, pixels = inputs(model)
    base = model.family.predict(noisy, t, text)
    with model.attached():
        tokens = model.project(model.features(pixels))
        assert torch.equal(model.predict(noisy, t, text, tokens, scale=0.0), base)
        assert torch.equal(model.predict(noisy, t, text, None), base)
        assert not torch.allclose(model.predict(noisy, t, text, tokens), base)


def test_detaching_leaves_no_trace(model: Model) -> None:
    noisy, t, text, pixels = inputs(model)
    unet = model.family.denoiser
    processors, keys = dict(unet.attn_processors), set(unet.state_dict())
    base = model.family.predict(noisy, t, text)
    with model.attached():
        model.predict(noisy, t, text, model.project(model.features(pixels)))
        assert set(unet.state_dict()) == keys, "the adapter must not be registered inside the frozen net"
    after = dict(unet.attn_processors)
    assert list(after) == list(processors) and all(after[k] is processors[k] for k in after)
    assert torch.equal(model.family.predict(noisy, t, text), base)


def test_pairs_start_as_the_frozen_text_pairs(model: Model) -> None:
    state = model.adapter.state_dict()
    for site in model.sites:
        key, value = model.family.site_weights(site)
        assert torch.equal(state[f"adapter_modules.{site.number}.to_k_ip.weight"], key)
        assert torch.equal(state[f"adapter_modules.{site.number}.to_v_ip.weight"], value)


def test_every_trained_tensor_gets_a_gradient_and_no_frozen_one(model: Model) -> None:
    noisy, t, text, pixels = inputs(model)
    with model.attached():
        model.predict(noisy, t, text, model.project(model.features(pixels))).square().mean().backward()
    for name, parameter in model.adapter.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    assert all(p.grad is None for p in model.family.denoiser.parameters())


def test_numbering_is_the_position_among_all_processors(model: Model) -> None:
    keys = list(model.family.denoiser.attn_processors)
    assert [s.number for s in model.sites] == [i for i, k in enumerate(keys) if "attn2" in k]
    assert all(s.number % 2 == 1 for s in model.sites)


def test_dropped_images_become_the_null_feature(model: Model) -> None:
    pixels = inputs(model)[3]
    kept = model.features(pixels)
    dropped = model.features(pixels, torch.tensor([False, True]))
    assert torch.equal(dropped[0], kept[0])
    if model.variant.feature == "image_embeds":
        assert not dropped[1].any()
    else:
        null = model.encoder.model(torch.zeros(1, 3, 32, 32), output_hidden_states=True).hidden_states[-2]
        torch.testing.assert_close(dropped[1:], null)


@pytest.mark.parametrize("setting", ["resampler_depth", "resampler_ff_mult", "resampler_head_dim"])
def test_settings_that_a_loader_would_compute_otherwise_are_refused(setting: str) -> None:
    plus = VARIANTS["plus"]
    with pytest.raises(Problem, match=setting):
        plus.projector(plus.Config(**{setting: 2}), context_dim=64, feature_dim=48, feature_length=17)


def test_base_tokens_other_than_four_are_refused() -> None:
    base = VARIANTS["base"]
    with pytest.raises(Problem, match="4 tokens"):
        base.projector(base.Config(num_tokens=8), context_dim=64, feature_dim=48, feature_length=1)


def test_a_file_that_does_not_fit_is_refused_before_any_weight_changes(
    base_folder: Callable, encoder_folder: Path
) -> None:
    model = build(base_folder("sd1"), encoder_folder, "base")
    before = {k: v.clone() for k, v in model.adapter.state_dict().items()}
    tables = {name: {k: v + 1 for k, v in table.items()} for name, table in model.adapter.published().items()}
    tables["image_proj"]["proj.bias"] = torch.zeros(3)
    with pytest.raises(Problem, match=r"image_proj\.proj\.bias is \[3\], expected"):
        model.adapter.load_published(tables, "file")
    assert all(torch.equal(before[k], v) for k, v in model.adapter.state_dict().items())
