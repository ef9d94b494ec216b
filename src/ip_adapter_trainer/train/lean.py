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
        # A convolution computes in channels-last when its weight lies so, whatever its input.
        is_wanted = config.channels_last == "on" or (config.channels_last == "auto" and model.dtype != torch.float32)
        if is_wanted:
            _set_format(denoiser, torch.channels_last)
            stack.callback(_set_format, denoiser, torch.contiguous_format)
        if config.compile != "off":  # the compiler itself weighs what to keep, and cannot read the lean layers
            stack.enter_context(compiled_blocks(denoiser, config.compile))
        elif config.lean_layers:
            stack.enter_context(lean_layers(denoiser, products=is_wanted and config.product_convolutions))
        yield


def _set_format(net: nn.Module, memory_format: torch.memory_format) -> None:
    """Set the memory format of convolutions' weights; codes of packed ones have their channels last as they are."""
    for weight in net.parameters():
        if weight.ndim == 4:
            weight.data = weight.data.contiguous(memory_format=memory_format)
