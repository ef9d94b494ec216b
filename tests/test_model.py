"""The laws of attaching an adapter, on every family and variant."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from ip_adapter_trainer.adapters import VARIANTS
from ip_adapter_trainer.core.errors import Problem
from ip_adapter_trainer.core.values import Geometry, ImageTokens, Need
from ip_adapter_trainer.families import BaseModel
from ip_adapter_trainer.layouts import make_layout
from ip_adapter_trainer.loading.base import load_base
from ip_adapter_trainer.loading.encoder import load_encoder
from ip_adapter_trainer.model import Architecture, Model, Text
from tests import tiny

GEOMETRY = Geometry((32, 32), (0, 0), (32, 32))


def build(base: Path, encoder: Path, variant: str, **config: int) -> Model:
    return assemble(load_base(str(base), dtype=torch.float32, device="cpu"), encoder, variant, **config)


def assemble(base: BaseModel, encoder: Path, variant: str, **config: int) -> Model:
    kind = VARIANTS[variant]
    loaded = load_encoder(str(encoder), features=tiny.FEATURES, dtype=torch.float32)
    return Model(base, {"image": loaded}, Architecture(kind, kind.Config(**config), make_layout("unet")))


@pytest.fixture(params=[(b, v) for b in tiny.BASES for v in ("base", "plus", "full")], ids="-".join)
def model(request: pytest.FixtureRequest, base_folder: Callable, encoder_folder: Path) -> Iterator[Model]:
    torch.manual_seed(0)
    base, variant = request.param
    yield build(base_folder(base), encoder_folder, variant)


Given = tuple[torch.Tensor, torch.Tensor, Text, list[Geometry]]


def inputs(model: Model, batch: int = 2) -> tuple[Given, torch.Tensor]:
    """The inputs of a denoiser, and the pixels of image prompts."""
    generator = torch.Generator().manual_seed(3)
    noisy = torch.randn(batch, 4, 8, 8, generator=generator)
    text = model.codec.text(["a red star", ""][:batch])
    given = noisy, torch.tensor([10, 900][:batch]), text, [GEOMETRY] * batch
    return given, torch.randn(batch, 3, 32, 32, generator=generator)


def tokens(model: Model, pixels: torch.Tensor) -> ImageTokens:
    return model.project(model.features({"image": pixels}))


def test_scale_zero_and_no_tokens_are_the_base_bit_for_bit(model: Model) -> None:
    given, pixels = inputs(model)
    base = model.denoiser.predict(*given)
    with model.attached():
        image = tokens(model, pixels)
        assert torch.equal(model.predict(*given, image, scale=0.0), base)
        assert torch.equal(model.predict(*given, None), base)
        assert not torch.allclose(model.predict(*given, image), base)


def test_detaching_leaves_no_trace(model: Model) -> None:
    given, pixels = inputs(model)
    unet = model.denoiser.net
    processors, keys = dict(unet.attn_processors), set(unet.state_dict())
    base = model.denoiser.predict(*given)
    with model.attached():
        model.predict(*given, tokens(model, pixels))
        assert set(unet.state_dict()) == keys, "the adapter must not be registered inside the frozen net"
    after = dict(unet.attn_processors)
    assert list(after) == list(processors) and all(after[k] is processors[k] for k in after)
    assert torch.equal(model.denoiser.predict(*given), base)


def test_pairs_start_as_the_frozen_text_pairs(model: Model) -> None:
    state = model.adapter.state_dict()
    for layer in model.layers:
        attention = model.denoiser.net.get_submodule(layer.name)
        assert torch.equal(state[f"adapter_modules.{layer.number}.to_k_ip.weight"], attention.to_k.weight)
        assert torch.equal(state[f"adapter_modules.{layer.number}.to_v_ip.weight"], attention.to_v.weight)


def test_every_trained_tensor_gets_a_gradient_and_no_frozen_one(model: Model) -> None:
    given, pixels = inputs(model)
    with model.attached():
        model.predict(*given, tokens(model, pixels)).square().mean().backward()
    for name, parameter in model.adapter.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    assert all(p.grad is None for p in model.denoiser.net.parameters())


def test_numbering_is_the_position_among_all_processors(model: Model) -> None:
    keys = list(model.denoiser.net.attn_processors)
    assert [layer.number for layer in model.layers] == [i for i, k in enumerate(keys) if "attn2" in k]
    assert all(layer.number % 2 == 1 and keys[layer.number] == f"{layer.name}.processor" for layer in model.layers)


def test_dropped_images_become_the_null_feature(model: Model) -> None:
    pixels, (need,) = inputs(model)[1], model.variant.needs
    kept = model.features({"image": pixels})[need]
    dropped = model.features({"image": pixels}, torch.tensor([False, True]))[need]
    assert torch.equal(dropped[0], kept[0])
    if need.feature == "image_embeds":
        assert not dropped[1].any()
    else:
        null = model.encoder.model(torch.zeros(1, 3, 32, 32), output_hidden_states=True).hidden_states[-2]
        torch.testing.assert_close(dropped[1:], null)


@pytest.mark.parametrize("setting", ["resampler_depth", "resampler_ff_mult", "resampler_head_dim"])
def test_settings_that_a_loader_would_compute_otherwise_are_refused(setting: str) -> None:
    plus = VARIANTS["plus"]
    with pytest.raises(Problem, match=setting):
        plus.projector(plus.Config(**{setting: 2}), {Need("image", "penultimate"): (17, 48)}, 64)


def test_base_tokens_other_than_four_are_refused() -> None:
    base = VARIANTS["base"]
    with pytest.raises(Problem, match="4 tokens"):
        base.projector(base.Config(num_tokens=8), {Need("image", "image_embeds"): (48,)}, 64)


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
