"""Whose picture a row is wrongly shown."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ip_adapter_trainer.core.rng import stream


def others(rows: int, seed: int, purpose: str) -> NDArray[np.int64]:
    """For each row another one, [rows]: one random cycle through all of them, so never its own."""
    cycle = stream(seed, purpose).permutation(rows)
    partners = np.empty(rows, np.int64)
    partners[cycle] = np.roll(cycle, 1)
    return partners
