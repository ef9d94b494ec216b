"""Fixtures every test may ask for: tiny bases and encoders, written once a session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ip_adapter_trainer.pocket import write
from tests import tiny

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[tiny.Base], Path]:
    """Gives the folder of a tiny base by kind."""
    made: dict[str, Path] = {}

    def get(kind: tiny.Base) -> Path:
        if kind not in made:
            made[kind] = tiny.make_base(tmp_path_factory.mktemp(kind), kind)
        return made[kind]

    return get


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP image encoder."""
    return tiny.make_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="session")
def rows_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`data.json` and `images/` with twelve rows, each with its own prompt image."""
    folder = tmp_path_factory.mktemp("rows")
    write.write_pairs(folder, write.training_pairs(0, 12))
    return folder
