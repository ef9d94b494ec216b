"""Low-rank deltas on every attention layer, as FaceID needs them: trained, resumed, and computed alike by diffusers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ip_adapter_trainer.adapter_files import read_adapter
from ip_adapter_trainer.core.errors import Problem
from ip_adapter_trainer.core.values import Geometry
from ip_adapter_trainer.export import ExportConfig, export
from ip_adapter_trainer.layouts import unet_lora
from ip_adapter_trainer.loading.adapter import load_model
from ip_adapter_trainer.storage.checkpoints import all_checkpoints

LAYOUT = {"layout": "unet_lora", "lora_rank": 4}


def export_of(run: Path, file: Path) -> float:
    return export(ExportConfig(source=str(run), output=str(file))).difference


@pytest.mark.parametrize(("base", "variant"), [("sd1", "base"), ("sdxl", "plus")])
def test_deltas_train_and_diffusers_computes_the_same(
    base: str, variant: str, train_run: Callable, tmp_path: Path
) -> None:
    run = train_run(tmp_path / "run", base=base, variant=variant, **LAYOUT)
    assert export_of(run, tmp_path / "adapter.safetensors") <= 1e-5
    file = read_adapter(tmp_path / "adapter.safetensors")
    ups = [tensor for name, tensor in file.ip_adapter.items() if name.endswith("_lora.up.weight")]
    assert len(ups) == 4 * len(file.numbers) and all(bool(up.any()) for up in ups), "each began at zero"
    assert file.numbers == list(range(len(file.numbers))), "self-attention has even numbers"


def test_the_base_runs_without_image_and_deltas_stay_on_at_scale_zero(train_run: Callable, tmp_path: Path) -> None:
    model = load_model(train_run(tmp_path / "run", learning_rate=1e-2, **LAYOUT))
    noisy, time, size = torch.randn(1, 4, 8, 8), torch.tensor([500]), (32, 32)
    text, geometry = model.codec.text(["a star"]), [Geometry(size, (0, 0), size)]
    with torch.no_grad():
        image, base = model.project(model.null(1)), model.denoiser.predict(noisy, time, text, geometry)
        with model.attached():
            assert torch.equal(model.predict(noisy, time, text, geometry, None), base)
            assert not torch.allclose(model.predict(noisy, time, text, geometry, image, scale=0.0), base)
        assert torch.equal(model.denoiser.predict(noisy, time, text, geometry), base)


def test_a_resumed_run_ends_with_the_same_bytes(train_run: Callable, tmp_path: Path) -> None:
    whole = train_run(tmp_path / "whole", **LAYOUT)
    half = train_run(tmp_path / "half", max_train_steps=2, **LAYOUT)
    train_run(half, resume_from_checkpoint="latest", **LAYOUT)
    files = [(all_checkpoints(run)[-1] / "pytorch_model.bin").read_bytes() for run in (whole, half)]
    assert files[0] == files[1]
    with pytest.raises(Problem, match="lora_rank was 4, is 8"):
        train_run(half, resume_from_checkpoint="latest", **LAYOUT | {"lora_rank": 8, "max_train_steps": 6})


def test_without_peft_nothing_is_exported(train_run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = train_run(tmp_path / "run", max_train_steps=1, **LAYOUT)
    monkeypatch.setattr(unet_lora, "find_spec", lambda name: None)
    with pytest.raises(Problem, match="peft"):
        export_of(run, tmp_path / "adapter.safetensors")
    assert not (tmp_path / "adapter.safetensors").exists()


def test_a_layout_that_does_not_go_with_the_base_is_refused(train_run: Callable, tmp_path: Path) -> None:
    with pytest.raises(Problem, match="is no layout"):
        train_run(tmp_path / "run", layout="own")
