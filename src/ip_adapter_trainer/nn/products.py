"""Convolutions over few positions as matrix products, for CPUs.

A CPU's convolution first lays its weight out anew, at every call, which for wide layers over few positions takes longer
than the sums. A channels-last weight [D, C, k, k] lies in memory as a matrix [D, k k C], which products take as it is.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Geometry = tuple[tuple[int, int], tuple[int, int]]  # stride and padding, each (down, across)


def product_pays(x: Tensor, weight: Tensor, stride: tuple[int, int], dilation: tuple[int, int], groups: int) -> bool:
    """Tell whether a convolution of [B, C, H, W] is the faster one as a product.

    Re-laying the weight out costs as much as some positions more would, and gathering patches as much as some channels
    more. One core with AMX, bf16, forward and backward: 2,560 to 1,280 channels at 64 positions 85 ms against 17 ms;
    1,280 to 1,280 at 1,024 and 1,920 to 640 at 512 positions the same; 640 to 640 at 1,024 positions 10 against 17 ms.
    """
    if x.device.type != "cpu" or groups != 1 or dilation != (1, 1):
        return False
    if not weight.is_contiguous(memory_format=torch.channels_last):
        return False
    positions = x.shape[0] * (x.shape[2] // stride[0]) * (x.shape[3] // stride[1])
    return 5 * positions <= 2 * weight.shape[0]


def product_forward(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """Compute `F.conv2d` of [B, C, H, W] with a channels-last weight [D, C, k, l], to channels-last [B, D, h, w]."""
    patches = _patches(x, weight.shape[2:], geometry)  # [B, h, w, k, l, C]
    out = F.linear(patches.flatten(3).flatten(0, 2), _matrix(weight), bias)  # [B h w, D]
    return out.view(*patches.shape[:3], -1).permute(0, 3, 1, 2)


def product_backward(gradient: Tensor, weight: Tensor, shape: torch.Size, geometry: Geometry) -> Tensor:
    """Take the gradient [B, D, h, w] of the output back to that of the input, channels-last [B, C, H, W].

    Patches overlap; what falls on one position is summed in fp32 and rounded once.
    """
    (batch, channels, height, width), (stride, padding) = shape, geometry
    rows = gradient.permute(0, 2, 3, 1).flatten(0, 2)  # one matrix, or PyTorch makes a copy of the weight for each line
    sizes = (batch, *gradient.shape[2:], *weight.shape[2:], channels)
    spread = (rows @ _matrix(weight)).view(sizes)  # [B, h, w, k, l, C]
    total = spread.new_zeros(batch, height + 2 * padding[0], width + 2 * padding[1], channels, dtype=torch.float32)
    for down in range(weight.shape[2]):
        for across in range(weight.shape[3]):
            _reached(total, down, across, spread.shape[1:3], stride).add_(spread[:, :, :, down, across])
    inner = total[:, padding[0] : padding[0] + height, padding[1] : padding[1] + width]
    return inner.to(gradient.dtype).contiguous().permute(0, 3, 1, 2)


def _matrix(weight: Tensor) -> Tensor:
    """View a channels-last weight [D, C, k, l] as the matrix [D, k l C] that it is in memory."""
    return weight.permute(0, 2, 3, 1).reshape(weight.shape[0], -1)


def _patches(x: Tensor, kernel: torch.Size, geometry: Geometry) -> Tensor:
    """View the patch of [B, C, H, W] under each output position, [B, h, w, k, l, C]."""
    (stride, padding), (down, across) = geometry, kernel
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, padding[1], padding[1], padding[0], padding[0]))
    return padded.unfold(1, down, stride[0]).unfold(2, across, stride[1]).permute(0, 1, 2, 4, 5, 3)


def _reached(total: Tensor, down: int, across: int, size: torch.Size, stride: tuple[int, int]) -> Tensor:
    """View of a padded input [B, H, W, C] what one place of the kernel sees at each of h x w output positions."""
    rows = slice(down, down + stride[0] * size[0], stride[0])
    columns = slice(across, across + stride[1] * size[1], stride[1])
    return total[:, rows, columns]
