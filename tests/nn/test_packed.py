"""Packed frozen layers: how much they hold, how far off they are, and gradients that are exactly the packed net's."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ip_adapter_trainer.core.errors import Problem
from ip_adapter_trainer.families import BaseModel
from ip_adapter_trainer.loading.base import load_base
from ip_adapter_trainer.model import Model
from ip_adapter_trainer.nn.packed import PackedConv2d, PackedLinear, Storage, expanded, pack, packed_weights
from ip_adapter_trainer.train.config import LeanConfig
from ip_adapter_trainer.train.lean import lean
from ip_adapter_trainer.train.run_plan import parameters
from tests import tiny
from tests.nn.test_lean import gradients
from tests.test_model import assemble, inputs

NEEDS_BNB = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="the extra bnb is missing")
NF4 = pytest.param("nf4", marks=NEEDS_BNB)
PLAIN = LeanConfig(lean_layers=False, channels_last="off")


def load(folder: Path, storage: Storage, dtype: torch.dtype = torch.float32) -> BaseModel:
    return load_base(str(folder), dtype=dtype, device="cpu", storage=storage)


def build(folder: Path, encoder: Path, storage: Storage) -> Model:
    torch.manual_seed(0)
    return assemble(load(folder, storage), encoder, "base")


def found(model: Model, config: LeanConfig = PLAIN) -> tuple[Tensor, Tensor]:
    """The prediction and the adapter's gradients."""
    with model.attached(), lean(model, config):
        prediction, grads, _ = gradients(model)
    return prediction, grads


def off(made: Tensor, true: Tensor) -> float:
    return float((made - true).norm() / true.norm())


def layers(net: nn.Module) -> Iterator[PackedLinear | PackedConv2d]:
    return (layer for layer in net.modules() if isinstance(layer, PackedLinear | PackedConv2d))


@pytest.mark.parametrize("base", tiny.UNETS)
@pytest.mark.parametrize(
    ("storage", "output", "gradient"), [("int8", 0.02, 0.03), pytest.param("nf4", 0.2, 0.3, marks=NEEDS_BNB)]
)
def test_a_packed_net_is_off_by_no_more_than_its_bits(
    base: tiny.Base, storage: Storage, output: float, gradient: float, base_folder: Callable, encoder_folder: Path
) -> None:
    stock, packed = (found(build(base_folder(base), encoder_folder, s)) for s in ("none", storage))
    assert 0 < off(packed[0], stock[0]) < output
    assert 0 < off(packed[1], stock[1]) < gradient


@pytest.mark.parametrize("storage", ["int8", NF4])
def test_gradients_are_those_of_a_net_with_the_expanded_weights(
    storage: Storage, base_folder: Callable, encoder_folder: Path
) -> None:
    packed, plain = (build(base_folder("sd1"), encoder_folder, s) for s in (storage, "none"))
    names = dict(plain.denoiser.net.named_modules())
    with torch.no_grad():
        for name, layer in packed.denoiser.net.named_modules():
            if isinstance(layer, PackedLinear | PackedConv2d):
                weight = expanded(layer.codes, layer.scales, layer.shape, torch.float32)
                names[name].weight.copy_(weight if weight.ndim == 2 else weight.permute(0, 3, 1, 2))
    for made, true in zip(found(packed), found(plain), strict=True):
        assert off(made, true) < 1e-5


@pytest.mark.parametrize("storage", ["int8", NF4])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("layout", ["off", "on"], ids=["contiguous", "channels_last"])
def test_lean_layers_layout_and_recomputation_change_nothing(
    storage: Storage, layout: str, recompute: bool, base_folder: Callable, encoder_folder: Path
) -> None:
    model = build(base_folder("sdxl"), encoder_folder, storage)
    expected = found(model)
    if recompute:
        model.checkpoint_activations()
    config = LeanConfig(channels_last=layout)  # type: ignore[arg-type]
    for made, true in zip(found(model, config), expected, strict=True):
        assert off(made, true) < 1e-5
    with model.attached(), lean(model, config):
        assert all(layer.codes.is_contiguous() for layer in layers(model.denoiser.net))


@pytest.mark.parametrize(("storage", "bits"), [("int8", 8), pytest.param("nf4", 4.5, marks=NEEDS_BNB)])
@pytest.mark.parametrize("base", tiny.UNETS)
def test_codes_take_the_bytes_that_they_should(
    base: tiny.Base, storage: Storage, bits: float, base_folder: Callable
) -> None:
    net, stock = (load(base_folder(base), s, torch.bfloat16).denoiser.net for s in (storage, "none"))
    for layer in layers(net):
        each = (bits if isinstance(layer, PackedLinear) else 8) / 8
        held, scales = sum(b.nbytes for b in layer.buffers()), 2 * layer.shape[0] * (each == 1)  # in bf16
        assert held == each * layer.shape.numel() + scales
    assert parameters(net) == parameters(stock), "a plan counts weights, however they are kept"
    assert packed_weights(net) > 0.6 * parameters(net)


@pytest.mark.parametrize("storage", ["int8", NF4])
@pytest.mark.parametrize("layer", [nn.Linear(64, 32), nn.Conv2d(8, 16, 3, padding=1, stride=2)], ids=["linear", "conv"])
def test_a_layer_holds_its_codes_and_nothing_else_for_the_backward_pass(layer: nn.Module, storage: Storage) -> None:
    net = nn.Sequential(layer).requires_grad_(False)
    x = torch.randn((4, 64) if isinstance(layer, nn.Linear) else (2, 8, 6, 6), requires_grad=True)
    pack(net, storage, "cpu", lambda name: False)
    own, held = {b.data_ptr() for b in net.buffers()}, []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t.data_ptr()) or t, lambda t: t):
        net(x).sum().backward()
    assert set(held) == own and x.grad is not None


@pytest.mark.parametrize("storage", ["int8", NF4])
def test_pairs_start_from_the_unpacked_text_weights_and_without_tokens_attaching_changes_nothing(
    storage: Storage, base_folder: Callable, encoder_folder: Path
) -> None:
    packed, stock = (build(base_folder("sd1"), encoder_folder, s) for s in (storage, "none"))
    for mine, theirs in zip(packed.adapter.parameters(), stock.adapter.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    given, _ = inputs(packed)
    base = packed.denoiser.predict(*given)
    with packed.attached():
        assert torch.equal(packed.predict(*given, None), base)


def test_nf4_without_its_library_is_refused_with_what_to_do(
    base_folder: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(Problem, match=r"bitsandbytes[^$]*--quantize[^$]*int8"):
        load(base_folder("sd1"), "nf4")
