"""Adapters remember the loading of their frozen models, and flags go before what they remember."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ip_adapter_trainer.adapter_files import read_adapter, write_adapter
from ip_adapter_trainer.card import card_of
from ip_adapter_trainer.core.errors import Problem
from ip_adapter_trainer.diffusion.schedulers import NoiseConfig
from ip_adapter_trainer.evaluate.config import GenerateConfig
from ip_adapter_trainer.loading.adapter import build_model
from ip_adapter_trainer.loading.config import loaded_with
from ip_adapter_trainer.prepare.config import PrepareConfig
from tests.test_model import build


@pytest.fixture
def adapter(base_folder: Callable, encoder_folder: Path, tmp_path: Path) -> Callable[..., Any]:
    """Gives the file of an adapter that remembers."""

    def of(**remembered: Any) -> Any:
        model = build(base_folder("sd1"), encoder_folder, "base")
        card = card_of(model, base=str(base_folder("sd1")), step=0, images_seen=0, loaded_with=remembered)
        write_adapter(tmp_path / "a.safetensors", model.adapter.published(), card.to_metadata(), model.layout)
        return read_adapter(tmp_path / "a.safetensors")

    return of


def load(file: Any, base: str | None = None, **flags: Any) -> Any:
    how = GenerateConfig(adapter="a", image=("i",), **flags)
    return build_model(file, base, None, torch.float32, "cpu", how).codec


def test_only_what_is_not_the_default_is_remembered() -> None:
    config = PrepareConfig(pretrained_model_name_or_path="b", image_encoder_path="e", data_json_file="d", clip_skip=2)
    assert loaded_with(config) == {"clip_skip": 2}
    assert loaded_with(NoiseConfig(rescale_betas_zero_snr=True)) == {"rescale_betas_zero_snr": True}


def test_frozen_models_are_loaded_as_the_adapter_remembers_and_flags_go_first(
    adapter: Callable, base_folder: Callable, tmp_path: Path
) -> None:
    file = adapter(clip_skip=2, prediction_type="v_prediction", unknown="x")
    found = load(file)
    assert found.clip_skip == 2 and found.pipeline.scheduler.config.prediction_type == "v_prediction"
    assert load(file, clip_skip=3, prediction_type="sample").clip_skip == 3
    same = load(file, base=str(base_folder("sd1")) + "/")
    assert same.pipeline.scheduler.config.prediction_type == "v_prediction", "named again, it is the same one"
    other = load(file, base=str(shutil.copytree(base_folder("sd1"), tmp_path / "other")))
    assert other.clip_skip == 2 and other.pipeline.scheduler.config.prediction_type == "epsilon", "of the other base"


def test_a_card_of_impossible_settings_is_told(adapter: Callable) -> None:
    for remembered in ({"clip_skip": 0}, {"clip_skip": "x"}, {"revision": ["a"]}):
        with pytest.raises(Problem, match="names settings that cannot be"):
            load(adapter(**remembered))
