"""Convolutions as matrix products are the convolutions, and are taken only where they are faster."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ip_adapter_trainer.nn.lean import lean_layers
from ip_adapter_trainer.nn.products import product_backward, product_forward, product_pays

LAST = torch.channels_last
BF16_ROUNDING = 2**-8


def layers(kernel: int, stride: int, padding: int, size: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Input, weight, bias and the output's gradient of a convolution from 5 to 7 channels."""
    generator = torch.Generator().manual_seed(kernel * 100 + stride * 10 + size)
    x = torch.randn(2, 5, size, size + 1, generator=generator)
    weight, bias = torch.randn(7, 5, kernel, kernel, generator=generator), torch.randn(7, generator=generator)
    out = F.conv2d(x, weight, bias, stride, padding)
    gradient = torch.randn(out.shape, generator=generator)
    x, weight, gradient = (t.to(dtype).to(memory_format=LAST) for t in (x, weight, gradient))
    return x, weight, bias.to(dtype), gradient


@settings(deadline=None, max_examples=60)
@given(kernel=st.integers(1, 4), stride=st.integers(1, 3), padding=st.integers(0, 2), size=st.integers(4, 9))
def test_forward_and_backward_are_the_convolutions(kernel: int, stride: int, padding: int, size: int) -> None:
    x, weight, bias, gradient = layers(kernel, stride, padding, size, torch.float32)
    geometry = ((stride, stride), (padding, padding))
    x.requires_grad_()
    expected = F.conv2d(x, weight, bias, *geometry)
    torch.testing.assert_close(product_forward(x, weight, bias, geometry), expected, rtol=1e-5, atol=1e-5)
    (wanted,) = torch.autograd.grad(expected, x, gradient)
    found = product_backward(gradient, weight, x.shape, geometry)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert found.is_contiguous(memory_format=LAST)


def test_in_bf16_the_backward_is_as_near_to_the_exact_one_as_the_convolutions() -> None:
    x, weight, bias, gradient = layers(3, 1, 1, 8, torch.bfloat16)
    x.requires_grad_()
    (own,) = torch.autograd.grad(F.conv2d(x, weight, bias, 1, 1), x, gradient)
    found = product_backward(gradient, weight, x.shape, ((1, 1), (1, 1)))
    exact = x.detach().double().requires_grad_()
    (wanted,) = torch.autograd.grad(F.conv2d(exact, weight.double(), None, 1, 1), exact, gradient.double())
    errors = [float((g.double() - wanted).norm() / wanted.norm()) for g in (own, found)]
    assert errors[1] < 2 * errors[0] < 4 * BF16_ROUNDING  # the library rounds otherwise on CPUs without bf16


@pytest.mark.parametrize(("channels", "side", "taken"), [(64, 4, True), (64, 8, False)])
def test_a_layer_takes_the_product_over_few_positions_only(channels: int, side: int, taken: bool) -> None:
    net = torch.nn.Conv2d(channels, channels, 3, padding=1).requires_grad_(False).to(memory_format=LAST)
    x = torch.randn(1, channels, side, side).to(memory_format=LAST).requires_grad_()
    expected = net(x)
    with lean_layers(net, products=True):
        made = net(x)
    assert (type(made.grad_fn).__name__ == "_ProductBackward") == taken
    torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["groups", "dilation", "contiguous", "device"])
def test_what_is_not_plain_stays_a_convolution(kind: str) -> None:
    x, weight = (torch.randn(shape).to(memory_format=LAST) for shape in ((1, 64, 2, 2), (64, 64, 3, 3)))
    assert product_pays(x, weight, (1, 1), (1, 1), 1)
    changed = {
        "groups": (x, weight, (1, 1), (1, 1), 2),
        "dilation": (x, weight, (1, 1), (2, 2), 1),
        "contiguous": (x, weight.contiguous(), (1, 1), (1, 1), 1),
        "device": (x.to("meta"), weight.to("meta"), (1, 1), (1, 1), 1),
    }
    assert not product_pays(*changed[kind])
