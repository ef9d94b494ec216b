"""Frozen layers that keep their weights in 8 or 4 bits and expand them where they are used.

Between the forward and the backward pass a layer holds its codes and nothing else: the weight is expanded once for
each. Products are of the compute dtype, so the gradient of an input is exactly that of the packed net.

- int8: one scale for each output channel, symmetric, in plain tensor operations.
- nf4: 4-bit normal floats in blocks of 64 (QLoRA, arXiv 2305.14314), by the kernels of bitsandbytes, for linear layers;
  convolutions stay at int8, without which the error of a denoiser's output was more than twice as large.

Layers of libraries hold more: bitsandbytes' 8-bit one its input, in fp16; torchao's int8 one its expanded weight; and
none packs convolutions, which are most of SD1.5.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ip_adapter_trainer.core.errors import Problem
from ip_adapter_trainer.nn.attention import gradient_flows
from ip_adapter_trainer.nn.choices import Storage as Storage

BLOCK = 64  # weights to a scale in nf4

Context = Any  # of torch.autograd.Function


def expanded(codes: Tensor, scales: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The weight of some shape [O, ...] that codes stand for."""
    if codes.dtype == torch.int8:
        return codes.to(dtype).mul_(scales.to(dtype))
    weight: Tensor = torch.ops.bitsandbytes.dequantize_4bit(codes, scales, BLOCK, "nf4", shape, dtype)
    return weight


def _packed(weight: Tensor, storage: Storage) -> tuple[Tensor, Tensor]:
    """Codes and scales of a weight [O, ...]."""
    if storage == "int8" or weight.ndim == 4:
        largest = weight.abs().amax(tuple(range(1, weight.ndim)), keepdim=True)
        scales = (largest.float() / 127).to(weight.dtype)  # rounded before the codes are, so that they make up for it
        return (weight.float() / scales.float().clamp(min=1e-12)).round().clamp(-127, 127).to(torch.int8), scales
    codes, scales = torch.ops.bitsandbytes.quantize_4bit(weight, BLOCK, "nf4", torch.uint8)
    return codes, scales


class _Product(torch.autograd.Function):
    """x W^T + b over codes of W, that holds the codes alone."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, shape: Any) -> Tensor:
        """[..., I] to [..., O]; `shape` is (O, I)."""
        ctx.save_for_backward(codes, scales)
        ctx.shape = shape
        return F.linear(x, expanded(codes, scales, shape, x.dtype), bias)

    @staticmethod
    def backward(ctx: Context, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Of [..., O] to the input's [..., I]."""
        codes, scales = ctx.saved_tensors
        return gradients[0] @ expanded(codes, scales, ctx.shape, gradients[0].dtype), None, None, None, None


class _Convolution(torch.autograd.Function):
    """2-D convolution [B, C, H, W] -> [B, D, h, w] over codes of its weight, that holds the codes alone."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, layer: PackedConv2d, codes: Tensor, scales: Tensor) -> Tensor:
        """`F.conv2d` with the layer's own geometry."""
        ctx.save_for_backward(codes, scales)
        ctx.layer, ctx.shape = layer, x.shape
        return layer.convolved(x)

    @staticmethod
    def backward(ctx: Context, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Of [B, D, h, w] to the input's [B, C, H, W]."""
        layer, gradient = ctx.layer, gradients[0]
        weight = layer.laid_out(*ctx.saved_tensors, gradient)
        unread = gradient.new_empty(1).expand(ctx.shape)  # only its shape matters to the input's gradient
        geometry = layer.stride, layer.padding, layer.dilation, False, [0, 0], layer.groups
        found = torch.ops.aten.convolution_backward(gradient, unread, weight, None, *geometry, [True, False, False])
        return found[0], None, None, None


class PackedLinear(nn.Linear):
    """A frozen `nn.Linear` without a weight: `codes` and `scales` stand for it."""

    codes: Tensor
    scales: Tensor
    shape: torch.Size  # of the weight, [O, I]

    def forward(self, input: Tensor) -> Tensor:
        """[..., I] to [..., O]."""
        if gradient_flows(input):
            out: Tensor = _Product.apply(input, self.codes, self.scales, self.bias, self.shape)
            return out
        return F.linear(input, expanded(self.codes, self.scales, self.shape, input.dtype), self.bias)


class PackedConv2d(nn.Conv2d):
    """A frozen `nn.Conv2d` without a weight: `codes` and `scales` stand for it, channels last."""

    codes: Tensor
    scales: Tensor
    shape: torch.Size  # of the weight with its channels last, [D, h, w, C]

    def laid_out(self, codes: Tensor, scales: Tensor, like: Tensor) -> Tensor:
        """The weight [D, C, h, w] in the dtype and the memory format of a tensor: convolutions follow either."""
        weight = expanded(codes, scales, self.shape, like.dtype).permute(0, 3, 1, 2)
        return weight if like.is_contiguous(memory_format=torch.channels_last) else weight.contiguous()

    def convolved(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, D, h, w]."""
        weight = self.laid_out(self.codes, self.scales, x)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, H, W] to [B, D, h, w]."""
        if not gradient_flows(input):
            return self.convolved(input)
        out: Tensor = _Convolution.apply(input, self, self.codes, self.scales)
        return out


Packed = PackedLinear | PackedConv2d


def pack(net: nn.Module, storage: Storage, device: torch.device | str, spared: Callable[[str], bool]) -> None:
    """Packs a net's linear layers and convolutions, one after another, each on a device.

    Args:
        net: frozen; its layers stay on their own device.
        storage: how weights are kept.
        device: where codes are made; only one weight at a time is there.
        spared: by a layer's name, whether its weight stays as it is.

    Raises:
        Problem: the storage's library is not installed.
    """
    if storage == "nf4":
        _demand_bitsandbytes()
    for name, layer in list(net.named_modules()):
        if storage != "none" and type(layer) in (nn.Linear, nn.Conv2d) and not spared(name):
            _pack(layer, storage, device)


@torch.no_grad()
def _pack(layer: Any, storage: Storage, device: torch.device | str) -> None:
    assert not layer.weight.requires_grad, "only what is frozen can be packed"
    own, weight = layer.weight.device, layer.weight.to(device)
    if weight.ndim == 4:
        assert layer.padding_mode == "zeros"
        weight = weight.permute(0, 2, 3, 1).contiguous()
    del layer.weight
    for name, tensor in zip(("codes", "scales"), _packed(weight, storage), strict=True):
        layer.register_buffer(name, tensor.to(own))
    layer.shape, layer.__class__ = weight.shape, PackedConv2d if weight.ndim == 4 else PackedLinear


def packed_weights(net: nn.Module) -> int:
    """Number of weights that a net keeps as codes."""
    return sum(layer.shape.numel() for layer in net.modules() if isinstance(layer, Packed))


def _demand_bitsandbytes() -> None:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        remedy = "pip install 'ip_adapter_trainer[bnb]', or take --quantize int8, which needs nothing"
        raise Problem("nf4 needs bitsandbytes", where="--quantize", remedy=remedy) from error
