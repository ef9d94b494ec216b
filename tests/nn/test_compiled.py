"""Compiled blocks: the stock gradients, no breaks, no compiling anew for every step, no trace.

Dynamo and AOTAutograd run for real; only code generation, minutes of it, is left out (backend `aot_eager`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch._dynamo.utils import counters

from ip_adapter_trainer.nn.compiled import compiled_blocks
from tests.nn.test_lean import gradients
from tests.test_model import build, inputs, tokens


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


def off(made: Tensor, true: Tensor) -> float:
    return float((made - true).norm() / true.norm())


def compiled(net: nn.Module) -> AbstractContextManager[None]:
    return compiled_blocks(net, "on", backend="aot_eager")


def test_gradients_are_the_stock_ones_recomputed_too_and_a_second_step_compiles_nothing(
    base_folder: Callable, encoder_folder: Path
) -> None:
    model = build(base_folder("sdxl"), encoder_folder, "base")
    keys = list(model.denoiser.net.state_dict())
    with model.attached():
        prediction, expected, _ = gradients(model)
        model.checkpoint_activations()
        with compiled(model.denoiser.net):
            made, found, _ = gradients(model)
            assert off(made, prediction) < 1e-5 and off(found, expected) < 1e-5
            first = graphs()
            assert off(gradients(model)[1], expected) < 1e-5
            assert graphs() == first > 5
            assert list(model.denoiser.net.state_dict()) == keys


def block_and_step(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Callable[[int, int], Tensor]]:
    """A net of one residual block, and the gradient of its input [1, 8, h, w]."""
    torch.manual_seed(0)
    net = nn.Sequential(ResnetBlock2D(in_channels=8, temb_channels=4, groups=2)).to(dtype).requires_grad_(False)

    def step(height: int, width: int) -> Tensor:
        numbers = torch.Generator().manual_seed(height)
        x = torch.randn(1, 8, height, width, generator=numbers).to(dtype).requires_grad_()
        out = net[0](x, torch.ones(1, 4, dtype=dtype))
        return torch.autograd.grad(out.float().square().mean(), x)[0].float()

    return net, step


def test_bf16_gradients_are_the_stock_ones_to_rounding() -> None:
    net, step = block_and_step(torch.bfloat16)
    expected = step(8, 8)
    with compiled(net):
        assert off(step(8, 8), expected) < 2e-2
        assert graphs() == 1


def test_a_second_size_compiles_once_more_and_further_ones_do_not() -> None:
    net, step = block_and_step()
    sizes = [(8, 8), (10, 12), (12, 10), (6, 14), (16, 4)]
    expected, found = [step(*size) for size in sizes], []
    with compiled(net):
        for size, true in zip(sizes, expected, strict=True):
            assert off(step(*size), true) < 1e-5
            found.append(graphs())
    assert found == [1, 2, 2, 2, 2]


def test_without_gradients_blocks_run_as_they_are_and_no_trace_is_left(
    base_folder: Callable, encoder_folder: Path
) -> None:
    model = build(base_folder("sd1"), encoder_folder, "base")
    given, pixels = inputs(model)
    own = [dict(vars(module)) for module in model.denoiser.net.modules()]
    with model.attached(), torch.no_grad():
        image = tokens(model, pixels)
        expected = [model.predict(*given, image, scale) for scale in (0.0, 0.5, 1.0)]
        with compiled(model.denoiser.net):
            for scale, true in zip((0.0, 0.5, 1.0), expected, strict=True):
                assert torch.equal(model.predict(*given, image, scale), true)
        assert graphs() == 0
    assert [set(vars(module)) for module in model.denoiser.net.modules()] == [set(names) for names in own]
