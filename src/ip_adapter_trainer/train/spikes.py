"""Losses far above what the run is used to, told once each."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any

WINDOW = 128  # the last losses, to which a new one is compared
FEWEST = 32  # losses before which nothing is usual
DEVIATIONS = 5.0  # of the logarithm; no step of healthy runs came to 3, whose losses vary tenfold with the timestep
LEAST = 0.1  # of a deviation: at large batches losses are nearly constant
_NORMAL = 1.4826  # median distance to standard deviation


class Spikes:
    """Compares each loss with the median of the last ones, by their own median distance to it, in logarithms.

    A run whose loss has risen for good gets used to it.
    """

    def __init__(self) -> None:
        self._logs: deque[float] = deque(maxlen=WINDOW)
        self._is_high = False

    def excess(self, loss: float) -> float | None:
        """Return how many times the usual loss this one is, where a spike begins with it.

        Args:
            loss: finite.
        """
        value = math.log(max(loss, 1e-30))
        usual, limit = self._usual()
        was_high, self._is_high = self._is_high, value > limit
        self._logs.append(value)
        return math.exp(value - usual) if self._is_high and not was_high else None

    def _usual(self) -> tuple[float, float]:
        if len(self._logs) < FEWEST:
            return 0.0, math.inf
        usual = statistics.median(self._logs)
        deviation = _NORMAL * statistics.median(abs(value - usual) for value in self._logs)
        return usual, usual + DEVIATIONS * max(deviation, LEAST)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, in JSON values."""
        return {"logs": list(self._logs), "is_high": self._is_high}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was given."""
        self._logs, self._is_high = deque(state["logs"], WINDOW), state["is_high"]
