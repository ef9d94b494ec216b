"""Copies from the host to a device that never make the host wait for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a host tensor [...] to a device without making the host wait for the device's earlier work.

    An ordinary copy from pageable memory waits until the device has done all that was asked of it before; from pinned
    memory it takes its place behind that, and the host goes on. Pinned blocks are kept and used again by PyTorch.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
