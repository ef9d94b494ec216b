"""Lean layers compute what the layers they stand for compute, keep less, and leave no trace."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ip_adapter_trainer.model import Model
from ip_adapter_trainer.nn.lean import lean_convolution, lean_geglu, lean_layers, lean_residual, product_convolution
from ip_adapter_trainer.train.config import LeanConfig
from ip_adapter_trainer.train.lean import lean
from tests import tiny
from tests.test_model import build, inputs, tokens

PARITY = 1e-5  # of the gradients' norm, in fp32


def lean_forwards(net: torch.nn.Module) -> list[object]:
    """The functions that compute in place of layers' own `forward`."""
    return [module.forward.func for module in net.modules() if "forward" in vars(module)]


def gradients(model: Model) -> tuple[torch.Tensor, torch.Tensor, int]:
    """The prediction, the adapter's gradients, and how many bytes besides weights the backward pass was given."""
    given, pixels = inputs(model)
    kept: dict[int, int] = {}
    weights = [*model.denoiser.net.parameters(), *model.adapter.parameters()]
    own = {weight.untyped_storage().data_ptr() for weight in weights}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.adapter.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        prediction = model.predict(*given, tokens(model, pixels))
        prediction.square().mean().backward()
    grads = [p.grad.flatten() for p in model.adapter.parameters() if p.grad is not None]
    return prediction.detach(), torch.cat(grads), sum(kept.values())


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("layout", ["off", "on"], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("base", tiny.UNETS)
def test_gradients_are_the_stock_ones(
    base: tiny.Base, layout: str, recompute: bool, base_folder: Callable, encoder_folder: Path
) -> None:
    model = build(base_folder(base), encoder_folder, "plus")
    stock, expected, _ = _run(model, LeanConfig(lean_layers=False, channels_last="off"))
    if recompute:
        model.checkpoint_activations()
    made, found, _ = _run(model, LeanConfig(channels_last=layout))  # type: ignore[arg-type]
    torch.testing.assert_close(made, stock, rtol=1e-4, atol=1e-5)
    assert (found - expected).norm() <= PARITY * expected.norm()


def _run(model: Model, config: LeanConfig) -> tuple[torch.Tensor, torch.Tensor, int]:
    with model.attached(), lean(model, config):
        return gradients(model)


def test_lean_layers_keep_less(base_folder: Callable, encoder_folder: Path) -> None:
    model = build(base_folder("sdxl"), encoder_folder, "base")
    off = LeanConfig(lean_layers=False, channels_last="off")
    kept = _run(model, off)[2], _run(model, off.model_copy(update={"lean_layers": True}))[2]
    assert kept[1] < 0.9 * kept[0]


def test_a_lean_denoiser_without_gradients_is_the_base_bit_for_bit_and_leaves_no_trace(
    base_folder: Callable, encoder_folder: Path
) -> None:
    model = build(base_folder("sdxl"), encoder_folder, "base")
    denoiser, (given, _) = model.denoiser.net, inputs(model)
    base, keys = model.denoiser.predict(*given), list(denoiser.state_dict())
    with lean(model, LeanConfig(channels_last="off")):
        assert set(lean_forwards(denoiser)) == {lean_convolution, lean_geglu, lean_residual}
        assert torch.equal(model.denoiser.predict(*given), base)
        assert list(denoiser.state_dict()) == keys
    with lean(model, LeanConfig(channels_last="on")):
        assert set(lean_forwards(denoiser)) == {product_convolution, lean_geglu, lean_residual}
    assert not lean_forwards(denoiser)
    assert all(p.is_contiguous() for p in denoiser.parameters())
    assert torch.equal(model.denoiser.predict(*given), base)


def test_trained_or_unusual_layers_stay_what_they_are() -> None:
    trained, padded = torch.nn.Conv2d(2, 2, 1), torch.nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect")
    padded.requires_grad_(False)
    net = torch.nn.Sequential(trained, padded)
    with lean_layers(net, products=True):
        assert not lean_forwards(net)


def test_half_precision_takes_channels_last_by_itself(base_folder: Callable, encoder_folder: Path) -> None:
    model = build(base_folder("sd1"), encoder_folder, "base")
    weight = model.denoiser.net.conv_in.weight
    with lean(model, LeanConfig()):
        assert weight.is_contiguous()
    model.denoiser.net.to(torch.bfloat16)
    with lean(model, LeanConfig()):
        assert model.denoiser.net.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_picture_is_encoded_bit_for_bit_as_by_the_stock_autoencoder(
    dtype: torch.dtype, base_folder: Callable, encoder_folder: Path
) -> None:
    codec = build(base_folder("sd1"), encoder_folder, "base").codec
    vae = codec.autoencoder.to(dtype)
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = pixels.clone()
    with torch.no_grad():
        stock = vae.encode(pixels).latent_dist.parameters
    lean: list[object] = []
    vae.encoder.mid_block.register_forward_hook(lambda *_: lean.extend(lean_forwards(vae.encoder)))
    assert torch.equal(codec.moments(pixels), stock) and torch.equal(pixels, before)
    assert lean_residual in lean and not lean_forwards(vae)
