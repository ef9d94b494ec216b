"""The memory that a device still has for this process, and what a forward pass keeps of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

_GROUP = Path("/sys/fs/cgroup")  # a container's limits (control groups, version 2)


def free_bytes(device: torch.device, sharing: int = 1) -> int:
    """Return the bytes that a device can still give to this process, one of so many that share a host."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    import psutil  # accelerate needs it

    return _left_to_container(int(psutil.virtual_memory().available)) // sharing


def _left_to_container(host: int) -> int:
    """Return the bytes that a container's limit leaves of the host's, if there is one; files only read give way."""
    try:
        limit, used, told = ((_GROUP / f"memory.{name}").read_text() for name in ("max", "current", "stat"))
        read = next(int(line.split()[1]) for line in told.splitlines() if line.startswith("inactive_file "))
        return min(host, int(limit) - int(used) + read)
    except (OSError, ValueError, StopIteration):  # no container, no limit ("max"), or another kernel's files
        return host


@contextmanager
def kept_bytes(*modules: nn.Module) -> Iterator[list[int]]:
    """Count in a list of one number the bytes that forward passes keep for backward, beside the modules' weights."""
    seen = {tensor.untyped_storage().data_ptr() for m in modules for tensor in (*m.parameters(), *m.buffers())}
    held, total = list[Tensor](), [0]  # held, so that no other storage takes a counted one's place

    def note(tensor: Tensor) -> Tensor:
        """Count a tensor's storage, unless it was counted."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            held.append(tensor)
            total[0] += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield total
