"""Frozen layers that keep for the backward pass only what the gradient of their input needs.

A layer whose weights are not trained needs less than autograd keeps. A convolution is linear in its input, so its
backward needs the weight alone, yet PyTorch holds its input as well. GroupNorm, SiLU and a gated GELU in a row hold
each other's outputs, which follow from the first input at the price of one more elementwise pass. The layers here do
the same sums in the forward pass; where no gradient flows they are the layers they replace, but for convolutions that
are faster as matrix products, and residual blocks that write over what they alone have seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.activations import GEGLU
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from ip_adapter_trainer.core.classes import classes_changed
from ip_adapter_trainer.nn.attention import gradient_flows
from ip_adapter_trainer.nn.products import product_backward, product_forward, product_pays

Context = Any  # of torch.autograd.Function
aten = torch.ops.aten


class _Convolution(torch.autograd.Function):
    """2-D convolution [B, C, H, W] -> [B, D, h, w] that holds its weight and nothing of its input but the shape."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
        """`F.conv2d`; `geometry` is stride, padding, dilation and groups."""
        ctx.save_for_backward(weight)
        ctx.shape, ctx.geometry = x.shape, geometry
        return F.conv2d(x, weight, bias, *geometry)

    @staticmethod
    def backward(ctx: Context, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Of [B, D, h, w] to the input's [B, C, H, W]; weight and bias are frozen and get none."""
        (weight,), (stride, padding, dilation, groups) = ctx.saved_tensors, ctx.geometry
        unread = gradients[0].new_empty(1).expand(ctx.shape)  # only its shape matters to the input's gradient
        wanted = [True, False, False]
        options = stride, padding, dilation, False, [0, 0], groups, wanted
        gradient, _, _ = aten.convolution_backward(gradients[0], unread, weight, None, *options)
        return gradient, None, None, None, None, None, None


class _Product(torch.autograd.Function):
    """The same as a matrix product, which a CPU does faster over few positions."""

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
    """SiLU of GroupNorm, [B, C, H, W], that holds its input and the groups' mean and deviation."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        """The norm by `groups` groups of channels, then SiLU."""
        x, sizes = _dense(x, x), (x.shape[0], x.shape[1], x.shape[2:].numel(), groups)
        normed, mean, rstd = aten.native_group_norm(x, weight, bias, *sizes, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.sizes, ctx.eps = sizes, eps
        return F.silu(normed, inplace=True)

    @staticmethod
    def backward(ctx: Context, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Computes the norm again, then goes back through SiLU and norm to the input's gradient."""
        x, weight, bias, mean, rstd = ctx.saved_tensors
        normed, _, _ = aten.native_group_norm(x, weight, bias, *ctx.sizes, ctx.eps)
        gradient = _dense(aten.silu_backward(gradients[0], normed), x)
        wanted = [True, False, False]
        gradient, _, _ = aten.native_group_norm_backward(gradient, x, mean, rstd, weight, *ctx.sizes, wanted)
        return gradient, None, None, None, None


def _dense(x: Tensor, like: Tensor) -> Tensor:
    """In the layout that the raw GroupNorm kernels take for granted: on a CPU that of `like`, elsewhere NCHW."""
    as_like = x.device.type == "cpu" and like.is_contiguous(memory_format=torch.channels_last)
    return x.contiguous(memory_format=torch.channels_last if as_like else torch.contiguous_format)


class _GatedGelu(torch.autograd.Function):
    """a * GELU(b) of [..., 2C] = (a, b), that holds its input alone."""

    @staticmethod
    def forward(ctx: Context, x: Tensor) -> Tensor:
        """[..., 2C] to [..., C]."""
        ctx.save_for_backward(x)
        linear, gate = x.chunk(2, -1)
        return F.gelu(gate).mul_(linear)

    @staticmethod
    def backward(ctx: Context, *gradients: Tensor) -> Tensor:
        """Computes the gate again; [..., C] to the input's [..., 2C]."""
        (x,) = ctx.saved_tensors  # once: gradient checkpointing hands them out a single time
        gradient = torch.empty_like(x)
        (linear, gate), (to_linear, to_gate) = x.chunk(2, -1), gradient.chunk(2, -1)
        torch.mul(gradients[0], F.gelu(gate), out=to_linear)
        to_gate.copy_(aten.gelu_backward(gradients[0] * linear, gate))
        return gradient


class LeanConv2d(nn.Conv2d):
    """`nn.Conv2d` with a frozen weight."""

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, H, W] to [B, D, h, w]."""
        if not gradient_flows(input):
            return super().forward(input)
        out: Tensor = _Convolution.apply(
            input, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups
        )
        return out


class ProductConv2d(LeanConv2d):
    """The same, as a matrix product where that is the faster way."""

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, H, W] to [B, D, h, w]."""
        stride, padding, dilation = self.stride, self.padding, self.dilation
        if not product_pays(input, self.weight, stride, dilation, self.groups):  # type: ignore[arg-type]
            return super().forward(input)
        out: Tensor = _Product.apply(input, self.weight, self.bias, stride, padding)
        return out


class LeanGEGLU(GEGLU):
    """diffusers' gated feed-forward entry."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[B, L, C] to [B, L, D]."""
        if not gradient_flows(hidden_states):
            return super().forward(hidden_states, *args, **kwargs)
        out: Tensor = _GatedGelu.apply(self.proj(hidden_states))
        return out


class LeanResnetBlock2D(ResnetBlock2D):
    """diffusers' residual block in the one shape that the frozen UNets have it in; see `_replacement`."""

    def forward(self, input_tensor: Tensor, temb: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[B, C, H, W] and time embedding [B, T], or none, to [B, D, H, W]."""
        hidden = self.conv1(_norm_silu(self.norm1, input_tensor))
        if self.time_emb_proj is not None:
            hidden = hidden + self.time_emb_proj(self.nonlinearity(temb))[:, :, None, None]
        hidden = self.conv2(_norm_silu(self.norm2, hidden))
        skipped = input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)
        return skipped + hidden if gradient_flows(hidden, skipped) else hidden.add_(skipped)


def _norm_silu(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    if not gradient_flows(x):
        return F.silu(norm(x), inplace=True)
    out: Tensor = _NormSilu.apply(x, norm.weight, norm.bias, norm.num_groups, norm.eps)
    return out


def _replacement(layer: nn.Module, products: bool) -> type[nn.Module] | None:
    """The lean class of a layer, if there is one that computes what this very layer computes."""
    kind = type(layer)
    if any(parameter.requires_grad for parameter in layer.parameters()):
        return None
    if kind is nn.Conv2d and layer.padding_mode == "zeros" and not isinstance(layer.padding, str):
        return ProductConv2d if products else LeanConv2d
    if kind is GEGLU:
        return LeanGEGLU
    if kind is ResnetBlock2D and _is_plain(layer):
        return LeanResnetBlock2D
    return None


def _is_plain(block: Any) -> bool:
    """Whether a residual block neither resizes nor scales, by time or at its end, and has SiLU and no dropout."""
    return (
        block.time_embedding_norm == "default"
        and block.upsample is None
        and block.downsample is None
        and not block.skip_time_act
        and isinstance(block.nonlinearity, nn.SiLU)
        and block.dropout.p == 0
        and block.output_scale_factor == 1
    )


@contextmanager
def lean_layers(net: nn.Module, *, products: bool) -> Iterator[None]:
    """Gives a frozen net's layers their lean classes for a while; parameters and their names stay where they are.

    Args:
        net: whose layers.
        products: whether convolutions may compute as matrix products; for nets that are laid out channels-last.
    """
    with classes_changed((layer, kind) for layer in net.modules() if (kind := _replacement(layer, products))):
        yield
