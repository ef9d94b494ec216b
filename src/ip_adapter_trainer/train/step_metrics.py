"""What the host learns of steps that the device has done: one step late on a GPU, so that it never waits for it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step, as all processes know it alike; `rows` are this process's."""

    step: int
    rows: list[int]
    rate: float
    loss: float
    norm: float
    is_finite: bool


class PendingMetrics:
    """Keeps steps whose numbers are on their way to the host.

    Attributes:
        late: steps that may stay unread between two steps. While a GPU works at a step, the host reads the one before
            and has the next ready; where nothing runs beside the host there is nothing to win.
    """

    def __init__(self, device: torch.device) -> None:
        self.late = 1 if device.type == "cuda" else 0
        self._sent: deque[tuple[int, list[int], float, Tensor, Any]] = deque()  # see `add`; last a CUDA event, or None

    def add(self, step: int, rows: list[int], rate: float, values: Tensor) -> None:
        """Take a step's numbers [3] on the device: loss, norm, one if not finite."""
        arrived = None
        if values.device.type == "cuda":
            values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        self._sent.append((step, rows, rate, values, arrived))

    def read(self, keep: int) -> Iterator[StepMetrics]:
        """Give the oldest steps, all but `keep` of them; wait until their numbers have come."""
        while len(self._sent) > keep:
            step, rows, rate, values, arrived = self._sent.popleft()
            if arrived is not None:
                arrived.synchronize()
            loss, norm, bad = values.tolist()
            yield StepMetrics(step, rows, rate, loss, norm, bad == 0)
