"""A tiny model for every family and variant."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ip_adapter_trainer.model import Model
from tests import tiny
from tests.test_model import build

Make = Callable[[tiny.Base, str], Model]


@pytest.fixture
def make(base_folder: Callable[[tiny.Base], Path], encoder_folder: Path) -> Make:
    """Gives a fresh tiny model of a base and a variant, the same every time."""

    def get(base: tiny.Base, variant: str) -> Model:
        torch.manual_seed(0)
        return build(base_folder(base), encoder_folder, variant)

    return get


@pytest.fixture(params=[(b, v) for b in tiny.BASES for v in ("base", "plus", "full")], ids="-".join)
def model(request: pytest.FixtureRequest, make: Make) -> Model:
    """Every family with every variant."""
    return make(*request.param)


@pytest.fixture(params=[("sd1", "base"), ("sd2v", "plus"), ("sdxl", "full")], ids="-".join)
def some_model(request: pytest.FixtureRequest, make: Make) -> Model:
    """Every family once, every variant once."""
    return make(*request.param)


@pytest.fixture
def sd1(make: Make) -> Model:
    """One of them."""
    return make("sd1", "base")
