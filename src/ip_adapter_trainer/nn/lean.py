"""Frozen layers that keep for the backward pass only what the gradient of their input needs.

A layer whose weights are not trained needs less than autograd keeps. A convolution is linear in its input, so its
backward needs the weight alone, yet PyTorch holds its input as well. GroupNorm, SiLU and a gated GELU in a row hold
each other's outputs, which follow from the first input at the price of one more elementwise pass. The layers here do
the same sums in the forward pass; where no gradient flows they are the layers they replace, but for convolutions that
are faster as matrix products, and residual blocks that write over what they alone have seen.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.activations import GEGLU
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

from ip_adapter_trainer.nn.attention import gradient_flows
from ip_adapter_trainer.nn.forwards import forwards_replaced
from ip_adapter_trainer.nn.products import product_backward, product_forward, product_pays

Context = Any  # of torch.autograd.Function
aten = torch.ops.aten


class _Convolution(torch.autograd.Function):
    """Convolves [B, C, H, W] -> [B, D, h, w], and holds the weight and nothing of the input but its shape."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
        """Compute `F.conv2d`; `geometry` is stride, padding, dilation and groups."""
        ctx.save_for_backward(weight)
        ctx.shape, ctx.geometry = x.shape, geometry
        return F.conv2d(x, weight, bias, *geometry)

    @staticmethod
    def backward(ctx: Context, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Go from [B, D, h, w] to the input's [B, C, H, W]; weight and bias are frozen and get none."""
        (weight,) = ctx.saved_tensors
        gradient = conv2d_input(ctx.shape, weight, gradients[0], *ctx.geometry)
        return gradient, None, None, None, None, None, None


class _Product(torch.autograd.Function):
    """Does the same as a matrix product, which a CPU does faster over few positions."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
        """See `product_forward`; `geometry` is stride and padding."""
        ctx.save_for_backward(weight)
        ctx.shape, ctx.geometry = x.shape, geometry
        return product_forward(x, weight, bias, geometry)  # type: ignore[arg-type]

    @staticmethod
    def backward(ctx: Context, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """See `product_backward`; weight and bias are frozen and get none."""
        (weight,) = ctx.saved_tensors
        return product_backward(gradients[0], weight, ctx.shape, ctx.geometry), None, None, None, None


class _NormSilu(torch.autograd.Function):
    """Computes SiLU of GroupNorm, [B, C, H, W], and holds the input and the groups' mean and deviation."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        """Norm by `groups` groups of channels, then take SiLU."""
        x, sizes = _dense(x, x), (x.shape[0], x.shape[1], x.shape[2:].numel(), groups)
        normed, mean, rstd = aten.native_group_norm(x, weight, bias, *sizes, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.sizes, ctx.eps = sizes, eps
        return F.silu(normed, inplace=True)

    @staticmethod
    def backward(ctx: Context, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the norm again, then go back through SiLU and norm to the input's gradient."""
        x, weight, bias, mean, rstd = ctx.saved_tensors
        normed, _, _ = aten.native_group_norm(x, weight, bias, *ctx.sizes, ctx.eps)
        gradient = _dense(aten.silu_backward(gradients[0], normed), x)
        wanted = [True, False, False]
        gradient, _, _ = aten.native_group_norm_backward(gradient, x, mean, rstd, weight, *ctx.sizes, wanted)
        return gradient, None, None, None, None


def _dense(x: Tensor, like: Tensor) -> Tensor:
    """Lay out as the raw GroupNorm kernels take for granted: on a CPU like `like`, elsewhere NCHW."""
    as_like = x.device.type == "cpu" and like.is_contiguous(memory_format=torch.channels_last)
    return x.contiguous(memory_format=torch.channels_last if as_like else torch.contiguous_format)


class _GatedGelu(torch.autograd.Function):
    """Computes a * GELU(b) of [..., 2C] = (a, b), and holds the input alone."""

    @staticmethod
    def forward(ctx: Context, x: Tensor) -> Tensor:
        """Go from [..., 2C] to [..., C]."""
        ctx.save_for_backward(x)
        linear, gate = x.chunk(2, -1)
        return F.gelu(gate).mul_(linear)

    @staticmethod
    def backward(ctx: Context, *gradients: Tensor) -> Tensor:
        """Compute the gate again; go from [..., C] to the input's [..., 2C]."""
        (x,) = ctx.saved_tensors  # once: gradient checkpointing hands them out a single time
        gradient = torch.empty_like(x)
        (linear, gate), (to_linear, to_gate) = x.chunk(2, -1), gradient.chunk(2, -1)
        torch.mul(gradients[0], F.gelu(gate), out=to_linear)
        to_gate.copy_(aten.gelu_backward(gradients[0] * linear, gate))
        return gradient


def lean_convolution(layer: nn.Conv2d, input: Tensor) -> Tensor:
    """Compute `nn.Conv2d`, [B, C, H, W] to [B, D, h, w], with a frozen weight."""
    if not gradient_flows(input):
        return nn.Conv2d.forward(layer, input)
    geometry = layer.stride, layer.padding, layer.dilation, layer.groups
    out: Tensor = _Convolution.apply(input, layer.weight, layer.bias, *geometry)
    return out


def product_convolution(layer: nn.Conv2d, input: Tensor) -> Tensor:
    """Compute the same [B, O, h, w] from [B, C, H, W], as a matrix product where that is the faster way."""
    stride, padding, dilation = layer.stride, layer.padding, layer.dilation
    if not product_pays(input, layer.weight, stride, dilation, layer.groups):  # type: ignore[arg-type]
        return lean_convolution(layer, input)
    out: Tensor = _Product.apply(input, layer.weight, layer.bias, stride, padding)
    return out


def lean_geglu(layer: GEGLU, hidden_states: Tensor) -> Tensor:
    """Compute diffusers' gated feed-forward entry, [B, L, C] to [B, L, D]."""
    if not gradient_flows(hidden_states):
        return GEGLU.forward(layer, hidden_states)
    out: Tensor = _GatedGelu.apply(layer.proj(hidden_states))
    return out


def lean_residual(block: ResnetBlock2D, input_tensor: Tensor, temb: Tensor | None) -> Tensor:
    """Compute diffusers' residual block, [B, C, H, W] to [B, D, H, W], in the shape that frozen nets have it in.

    See `_is_plain`; `temb` [B, T] is the time's embedding, where the block has a layer for it.
    """
    hidden = block.conv1(_norm_silu(block.norm1, input_tensor))
    if block.time_emb_proj is not None:
        hidden = hidden + block.time_emb_proj(block.nonlinearity(temb))[:, :, None, None]
    hidden = block.conv2(_norm_silu(block.norm2, hidden))
    skipped = input_tensor if block.conv_shortcut is None else block.conv_shortcut(input_tensor)
    return skipped + hidden if gradient_flows(hidden, skipped) else hidden.add_(skipped)


def _norm_silu(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    if not gradient_flows(x):
        return F.silu(norm(x), inplace=True)
    out: Tensor = _NormSilu.apply(x, norm.weight, norm.bias, norm.num_groups, norm.eps)
    return out


def _lean_forward(layer: nn.Module, products: bool) -> Callable[..., Tensor] | None:
    """Return what computes the same as a layer and keeps less, if there is such a thing for this very layer."""
    if any(parameter.requires_grad for parameter in layer.parameters()):
        return None
    if type(layer) is nn.Conv2d and layer.padding_mode == "zeros" and not isinstance(layer.padding, str):
        return partial(product_convolution if products else lean_convolution, layer)
    if type(layer) is GEGLU:
        return partial(lean_geglu, layer)
    if type(layer) is ResnetBlock2D and _is_plain(layer):
        return partial(lean_residual, layer)
    return None


def _is_plain(block: Any) -> bool:
    """Tell whether a residual block neither resizes nor scales, by time or at its end, and has SiLU and no dropout."""
    return (
        block.time_embedding_norm == "default"
        and block.upsample is None
        and block.downsample is None
        and not block.skip_time_act
        and isinstance(block.nonlinearity, nn.SiLU)
        and block.dropout.p == 0
        and block.output_scale_factor == 1
    )


def lean_layers(net: nn.Module, *, products: bool) -> AbstractContextManager[None]:
    """Let a frozen net's layers keep less for a while; parameters and their names stay where they are.

    With `products`, convolutions of a channels-last net may compute as matrix products.
    """
    return forwards_replaced((layer, lean) for layer in net.modules() if (lean := _lean_forward(layer, products)))
