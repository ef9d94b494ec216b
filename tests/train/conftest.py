"""Training runs on tiny bases and a few rows of the pocket world."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., Path]


@pytest.fixture
def run(train_run: Run) -> Run:
    """Trains in this process and gives the output folder."""
    return train_run
