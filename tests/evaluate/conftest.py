"""A tiny model for every family and variant."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ip_adapter_trainer.model import Model
from tests import tiny
from tests.test_model import build


@pytest.fixture(params=[(b, v) for b in tiny.BASES for v in ("base", "plus", "full")], ids="-".join)
def model(request: pytest.FixtureRequest, base_folder: Callable[[tiny.Base], Path], encoder_folder: Path) -> Model:
    """Every family with every variant."""
    torch.manual_seed(0)
    base, variant = request.param
    return build(base_folder(base), encoder_folder, variant)


@pytest.fixture
def sd1(base_folder: Callable[[tiny.Base], Path], encoder_folder: Path) -> Model:
    """One of them."""
    torch.manual_seed(0)
    return build(base_folder("sd1"), encoder_folder, "base")
