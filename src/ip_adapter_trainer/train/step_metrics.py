"""Numbers of steps as the host learns them: one step late on a GPU, so that it never waits for the device."""

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


@dataclass(frozen=True)
class _Sent:
    step: int
    rows: list[int]
    rate: float
    values: Tensor  # [3] on the host, once `arrived` says so
    arrived: Any  # a CUDA event, or None


class PendingMetrics:
    """Steps whose numbers are on their way to the host.

    Attributes:
        late: steps that may stay unread between two steps. While a GPU works at a step, the host reads the one before
            and has the next ready; where nothing runs beside the host there is nothing to win.
    """

    def __init__(self, device: torch.device) -> None:
        self.late = 1 if device.type == "cuda" else 0
        self._sent: deque[_Sent] = deque()

    def add(self, step: int, rows: list[int], rate: float, values: Tensor) -> None:
        """Take a step's numbers [3] on the device: loss, norm, one if not finite."""
        if values.device.type != "cuda":
            self._sent.append(_Sent(step, rows, rate, values, None))
            return
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        self._sent.append(_Sent(step, rows, rate, host, arrived))

    def read(self, keep: int) -> Iterator[StepMetrics]:
        """Yield the metrics of the oldest steps, all but `keep` of them; wait until their numbers have come."""
        while len(self._sent) > keep:
            sent = self._sent.popleft()
            if sent.arrived is not None:
                sent.arrived.synchronize()
            loss, norm, bad = sent.values.tolist()
            yield StepMetrics(sent.step, sent.rows, sent.rate, loss, norm, bad == 0)
