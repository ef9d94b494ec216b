"""Copies of good models to damage, and a hub on this machine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from torch import Tensor

from ip_adapter_trainer.loading import hub as loading_hub
from tests import tiny
from tests.hub import Hub

Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def change_weights(file: Path, change: Change) -> None:
    """Writes what `change` makes of a file's tensors."""
    tensors = change(load_file(file))
    save_file({key: value.contiguous() for key, value in tensors.items()}, file, metadata={"format": "pt"})


def change_json(file: Path, **values: Any) -> None:
    """Sets values in a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def weights_of(folder: Path) -> Path:
    """Return the weights file of a part's folder."""
    (file,) = folder.glob("*.safetensors")
    return file


@pytest.fixture
def base(base_folder: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """Gives a copy of a tiny base by kind."""

    def copy(kind: str = "sd1") -> Path:
        return Path(shutil.copytree(base_folder(kind), tmp_path / kind))

    return copy


@pytest.fixture
def encoder(encoder_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny image encoder."""
    return Path(shutil.copytree(encoder_folder, tmp_path / "encoder"))


@pytest.fixture
def scorer(tmp_path: Path) -> Path:
    """A tiny CLIP model with its tokenizer and preprocessing."""
    return tiny.make_scorer(tmp_path / "clip")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub that huggingface_hub asks in this process, with a cache of its own."""
    with Hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.address)
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        url = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(loading_hub, "PATIENCE_S", 2.0)
        forget()
        yield hub
        hub.is_silent = False
    forget()


def forget() -> None:
    """As a new process, which has asked the hub for nothing yet."""
    for remembered in (loading_hub._asked, loading_hub._cached, loading_hub._brought):
        remembered.cache_clear()
