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
from torch.nn.grad import conv2d_input

from ip_adapter_trainer.core.errors import Problem
from ip_adapter_trainer.nn.attention import gradient_flows
from ip_adapter_trainer.nn.choices import Storage as Storage

BLOCK = 64  # weights to a scale in nf4

Context = Any  # of torch.autograd.Function


def expanded(codes: Tensor, scales: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Return the weight of some shape [O, ...] that codes stand for."""
    if codes.dtype == torch.int8:
        return codes.to(dtype).mul_(scales.to(dtype))
    weight: Tensor = torch.ops.bitsandbytes.dequantize_4bit(codes, scales, BLOCK, "nf4", shape, dtype)
    return weight


def _codes_and_scales(weight: Tensor, storage: Storage) -> tuple[Tensor, Tensor]:
    """Pack a weight [O, ...]."""
    if storage == "int8" or weight.ndim == 4:
        largest = weight.abs().amax(tuple(range(1, weight.ndim)), keepdim=True)
        scales = (largest.float() / 127).to(weight.dtype)  # rounded before the codes are, so that they make up for it
        return (weight.float() / scales.float().clamp(min=1e-12)).round().clamp(-127, 127).to(torch.int8), scales
    codes, scales = torch.ops.bitsandbytes.quantize_4bit(weight, BLOCK, "nf4", torch.uint8)
    return codes, scales


class _Product(torch.autograd.Function):
    """Computes x W^T + b over codes of W, and holds the codes alone."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, shape: Any) -> Tensor:
        """Go from [..., I] to [..., O]; `shape` is (O, I)."""
        ctx.save_for_backward(codes, scales)
        ctx.shape = shape
        return F.linear(x, expanded(codes, scales, shape, x.dtype), bias)

    @staticmethod
    def backward(ctx: Context, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Go from [..., O] to the input's [..., I]."""
        codes, scales = ctx.saved_tensors
        return gradients[0] @ expanded(codes, scales, ctx.shape, gradients[0].dtype), None, None, None, None


class _Convolution(torch.autograd.Function):
    """Convolves [B, C, H, W] -> [B, D, h, w] over codes of the weight, and holds the codes alone."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, layer: PackedConv2d, codes: Tensor, scales: Tensor) -> Tensor:
        """Compute `F.conv2d` with the layer's own geometry."""
        ctx.save_for_backward(codes, scales)
        ctx.layer, ctx.shape = layer, x.shape
        return layer.convolved(x)

    @staticmethod
    def backward(ctx: Context, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Go from [B, D, h, w] to the input's [B, C, H, W]."""
        layer, gradient = ctx.layer, gradients[0]
        weight = layer.laid_out(*ctx.saved_tensors, gradient)
        return conv2d_input(ctx.shape, weight, gradient, *layer.geometry), None, None, None


class _Packed(nn.Module):
    """Stands for a frozen layer: `codes` and `scales` in place of its weight, which may be packed on another device."""

    codes: Tensor
    scales: Tensor

    def __init__(self, layer: nn.Linear | nn.Conv2d, weight: Tensor, storage: Storage) -> None:
        super().__init__()
        assert not weight.requires_grad, "only what is frozen can be packed"
        self.shape, self.bias = weight.shape, layer.bias
        codes, scales = _codes_and_scales(weight, storage)
        self.register_buffer("codes", codes.to(layer.weight.device))
        self.register_buffer("scales", scales.to(layer.weight.device))


class PackedLinear(_Packed):
    """Stands for a frozen `nn.Linear`, whose weight is [O, I], packed on a device."""

    def __init__(self, layer: nn.Linear, storage: Storage, device: torch.device | str) -> None:
        super().__init__(layer, layer.weight.to(device), storage)
        self.in_features, self.out_features = layer.in_features, layer.out_features

    def forward(self, input: Tensor) -> Tensor:
        """Go from [..., I] to [..., O]."""
        if gradient_flows(input):
            out: Tensor = _Product.apply(input, self.codes, self.scales, self.bias, self.shape)
            return out
        return F.linear(input, expanded(self.codes, self.scales, self.shape, input.dtype), self.bias)


class PackedConv2d(_Packed):
    """Stands for a frozen `nn.Conv2d`, packed on a device with the weight's channels last, [D, h, w, C]."""

    geometry: Any  # stride, padding, dilation and groups

    def __init__(self, layer: nn.Conv2d, storage: Storage, device: torch.device | str) -> None:
        assert layer.padding_mode == "zeros"
        super().__init__(layer, layer.weight.to(device).permute(0, 2, 3, 1).contiguous(), storage)
        self.geometry = layer.stride, layer.padding, layer.dilation, layer.groups

    def laid_out(self, codes: Tensor, scales: Tensor, like: Tensor) -> Tensor:
        """Return the weight [D, C, h, w] in the dtype and the memory format of a tensor: convolutions follow either."""
        weight = expanded(codes, scales, self.shape, like.dtype).permute(0, 3, 1, 2)
        return weight if like.is_contiguous(memory_format=torch.channels_last) else weight.contiguous()

    def convolved(self, x: Tensor) -> Tensor:
        """Go from [B, C, H, W] to [B, D, h, w]."""
        weight = self.laid_out(self.codes, self.scales, x)
        return F.conv2d(x, weight, self.bias, *self.geometry)

    def forward(self, input: Tensor) -> Tensor:
        """Go from [B, C, H, W] to [B, D, h, w]."""
        if not gradient_flows(input):
            return self.convolved(input)
        out: Tensor = _Convolution.apply(input, self, self.codes, self.scales)
        return out


def pack(net: nn.Module, storage: Storage, device: torch.device | str, spared: Callable[[str], bool]) -> None:
    """Replace a net's linear layers and convolutions by packed ones, one after another, each packed on a device.

    The net's layers stay on their own device; those whose names are spared stay as they are.

    Raises:
        Problem: the storage's library is not installed.
    """
    if storage == "none":
        return
    if storage == "nf4":
        try:
            import bitsandbytes  # noqa: F401
        except ImportError as error:
            remedy = "pip install 'ip_adapter_trainer[bnb]', or take --quantize int8, which needs nothing"
            raise Problem("nf4 needs bitsandbytes", where="--quantize", remedy=remedy) from error
    packed = {nn.Linear: PackedLinear, nn.Conv2d: PackedConv2d}
    names = [name for name, layer in net.named_modules() if type(layer) in packed and not spared(name)]
    for name in names:  # no list of layers, which would keep the weights of all of them to the end
        layer = net.get_submodule(name)
        net.set_submodule(name, packed[type(layer)](layer, storage, device))


def packed_weights(net: nn.Module) -> int:
    """Count the weights that a net keeps as codes."""
    return sum(layer.shape.numel() for layer in net.modules() if isinstance(layer, _Packed))
