"""The frozen denoiser made lean for the length of a run, as the settings say."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from ip_adapter_trainer.model import Model
from ip_adapter_trainer.nn.compiled import compiled_blocks
from ip_adapter_trainer.nn.lean import lean_layers
from ip_adapter_trainer.train.config import LeanConfig


@contextmanager
def lean(model: Model, config: LeanConfig) -> Iterator[None]:
    """Make an attached model's training step lean; afterwards its layers, processors and layout are what they were."""
    denoiser = model.denoiser.net
    with ExitStack() as stack:
        laid_out = _channels_last(config, model.dtype)
        if laid_out:
            _lay_out(denoiser, torch.channels_last)
            stack.callback(_lay_out, denoiser, torch.contiguous_format)
        if config.compile != "off":  # the compiler itself weighs what to keep, and cannot read the lean layers
            stack.enter_context(compiled_blocks(denoiser, config.compile))
        elif config.lean_layers:
            stack.enter_context(lean_layers(denoiser, products=laid_out and config.product_convolutions))
        yield


def _lay_out(net: nn.Module, memory_format: torch.memory_format) -> None:
    """Lays weights of convolutions out; codes of packed ones have their channels last as they are."""
    for weight in net.parameters():
        if weight.ndim == 4:
            weight.data = weight.data.contiguous(memory_format=memory_format)


def _channels_last(config: LeanConfig, dtype: torch.dtype) -> bool:
    """A convolution computes in channels-last when its weight lies so, whatever its input."""
    return config.channels_last == "on" or (config.channels_last == "auto" and dtype != torch.float32)
