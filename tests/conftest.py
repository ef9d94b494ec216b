"""Fixtures every test may ask for: tiny bases and encoders, written once a session."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ip_adapter_trainer.config import parse_train, write_resolved
from ip_adapter_trainer.pocket import write
from ip_adapter_trainer.train.run import train
from tests import tiny

torch.set_num_threads(1)
os.environ["ACCELERATE_MIXED_PRECISION"] = "no"  # results are the same on every machine; bf16 is asked for by name


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


@pytest.fixture(scope="session")
def flags(rows_folder: Path, base_folder: Callable, encoder_folder: Path) -> Callable[..., list[str]]:
    """Flags of a short run; keywords override."""

    def make(output: Path, base: str = "sd1", **more: object) -> list[str]:
        settings: dict[str, object] = {
            "pretrained_model_name_or_path": base_folder(base), "image_encoder_path": encoder_folder,
            "data_json_file": rows_folder / "data.json", "data_root_path": rows_folder / "images",
            "output_dir": output, "resolution": 32, "train_batch_size": 2, "max_train_steps": 4, "save_steps": 2,
            "report_to": "none", "learning_rate": 1e-3, "num_validation_images": 2, "validation_share": 0,
            "grid_rows": 0, "logging_steps": 2, "prepare": "off",
        }  # fmt: skip
        settings |= more
        return [f"--{k}" if v is True else f"--{k}={v}" for k, v in settings.items() if v is not None]

    return make


@pytest.fixture
def train_run(flags: Callable[..., list[str]]) -> Callable[..., Path]:
    """Trains in this process and gives the output folder."""

    def go(output: Path, **more: object) -> Path:
        train(parse_train(flags(output, **more)), write_resolved)
        return output

    return go
