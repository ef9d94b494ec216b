"""Runs for small cards: what `--low_memory` stands for, packed weights and 8-bit moments in a whole run."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml

from ip_adapter_trainer.config import RESOLVED, parse_train
from ip_adapter_trainer.core.errors import Problem
from ip_adapter_trainer.export import ExportConfig, export
from ip_adapter_trainer.model import Model
from ip_adapter_trainer.prepare.encode import Encoding
from ip_adapter_trainer.train import checkpoint
from ip_adapter_trainer.train.presets import PRESETS
from tests.train.test_resume import assert_same_run

NEEDS_BNB = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="the extra bnb is missing")
EVERY_CARD = [(base, memory) for base in ("sd1", "sdxl") for memory in (8, 12, 24)]


@NEEDS_BNB
@pytest.mark.parametrize(("base", "memory"), EVERY_CARD)
def test_each_card_trains_saves_and_exports_what_diffusers_reads_alike(
    run: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str], base: str, memory: int
) -> None:
    own = {
        "train_batch_size": 8,
        "prepare": "auto",
    }  # three steps are two epochs then, and it prepares first as a longer run does
    output = run(tmp_path / "out", base=base, low_memory=memory, max_train_steps=3, grid_rows=1, grid_steps=2, **own)
    told = capsys.readouterr().err
    assert f"low_memory {memory}: mixed_precision bf16" in told and "train_batch_size 8" in told
    assert (output / "prepared").exists() and len(list((output / "grids").iterdir())) == 1
    saved = yaml.safe_load((output / RESOLVED).read_text())
    assert saved.items() >= (dict(PRESETS[{"sd1": "sd"}.get(base, base)][memory]) | own).items()
    adapter = tmp_path / "adapter.safetensors"
    assert export(ExportConfig(source=str(output), output=str(adapter), dtype="fp32")).difference <= 1e-5


def test_the_denoiser_goes_to_the_device_when_what_encodes_is_gone(
    run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler: list[str] = []

    def note(kind: type, name: str) -> None:
        own = getattr(kind, name)

        def noted(self: object, *args: object, **kwargs: object) -> None:
            sampler.append(name)
            own(self, *args, **kwargs)

        monkeypatch.setattr(kind, name, noted)

    for kind, name in ((Model, "place_encoders"), (Encoding, "finish"), (Model, "release_encoders"), (Model, "place")):
        note(kind, name)
    run(tmp_path / "out", max_train_steps=12, prepare="auto", num_validation_images=0)
    assert sampler == ["place_encoders", "finish", "release_encoders", "place"]


@NEEDS_BNB
@pytest.mark.parametrize("extra", [{"quantize": "nf4"}, {"use_8bit_adam": True}], ids=lambda e: next(iter(e)))
def test_a_resumed_run_ends_with_the_same_bytes(run: Callable, tmp_path: Path, extra: dict[str, object]) -> None:
    whole, broken = run(tmp_path / "whole", **extra), tmp_path / "broken"
    shutil.copytree(whole, broken)
    shutil.rmtree(broken / "checkpoint-4")
    run(broken, resume_from_checkpoint="latest", **extra)
    assert_same_run(whole, broken, 4)


@NEEDS_BNB
def test_moments_of_8_bits_take_a_quarter_and_train_nearly_alike(run: Callable, tmp_path: Path) -> None:
    outputs = [run(tmp_path / "32"), run(tmp_path / "8", use_8bit_adam=True)]
    moments = [checkpoint.read(output / "checkpoint-4").state["optimizer"] for output in outputs]
    held = [sum(t.nbytes for s in m.values() for k, t in s.items() if _is_moment(k, t)) for m in moments]
    assert held[1] < 0.35 * held[0], "those of small tensors stay as they are"
    weights = [checkpoint.read(output / "checkpoint-4").weights for output in outputs]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=0, atol=4e-3)  # 4 steps of 1e-3


def _is_moment(name: str, value: object) -> bool:
    return isinstance(value, torch.Tensor) and name in ("exp_avg", "exp_avg_sq", "state1", "state2")


def test_a_flag_wins_over_a_card_and_a_card_over_a_file(flags: Callable, tmp_path: Path) -> None:
    def parsed(*argv: str) -> dict[str, object]:
        return parse_train([*flags(tmp_path, base="sdxl"), *argv]).model_dump(mode="json")

    card = parsed("--low_memory=8")
    assert (card["quantize"], card["gradient_checkpointing"], card["train_batch_size"]) == ("nf4", True, 2)
    assert parsed("--low_memory=8", "--quantize=int8", "--no_gradient_checkpointing").items() >= {
        "quantize": "int8", "gradient_checkpointing": False, "use_8bit_adam": True,
    }.items()  # fmt: skip
    file = tmp_path / "own.yaml"
    file.write_text("low_memory: 8\nquantize: int8\n")
    assert parsed(f"--config={file}")["quantize"] == "int8", "what a file says itself is not overruled by its card"
    assert parsed(f"--config={file}", "--low_memory=8")["quantize"] == "nf4", "given on the command line, it is"
    file.write_text(yaml.safe_dump(parsed("--low_memory=12")))
    assert parsed(f"--config={file}") == parsed("--low_memory=12"), "a resolved file says all"
    assert parsed()["low_memory"] is None and parsed()["quantize"] == "none"


def test_a_card_that_no_settings_are_known_for_is_refused(
    flags: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse_train([*flags(tmp_path), "--low_memory=6"])
    assert "invalid choice '6'" in capsys.readouterr().err
    monkeypatch.delitem(PRESETS, "sd")
    with pytest.raises(Problem, match=r"no settings of sd are known[^$]*--low_memory[^$]*set --quantize"):
        parse_train([*flags(tmp_path), "--low_memory=8"])


def test_what_compiling_cannot_go_with_is_refused(run: Callable, tmp_path: Path) -> None:
    with pytest.raises(Problem, match=r"packed weights in full[^$]*--compile --quantize[^$]*leave out"):
        run(tmp_path / "out", compile="on", quantize="int8")
    with pytest.raises(Problem, match=r"CUDA graphs[^$]*--compile on"):
        run(tmp_path / "out", compile="reduce-overhead")


@pytest.mark.slow
def test_a_compiled_run_trains_validates_and_draws_as_any_other(
    run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ip_adapter_trainer.train import lean

    extra = {"max_train_steps": 2, "validation_steps": 1, "grid_rows": 1, "grid_steps": 1}
    plain, traced = run(tmp_path / "plain", **extra), partial(lean.compiled_blocks, backend="aot_eager")
    monkeypatch.setattr(lean, "compiled_blocks", traced)  # all but code generation, which takes minutes
    compiled = run(tmp_path / "compiled", compile="on", **extra)
    expected, found = (checkpoint.read(output / "checkpoint-2").weights for output in (plain, compiled))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5)
    lines = [(output / "metrics.jsonl").read_text().count("training_rows/loss_none") for output in (plain, compiled)]
    assert lines == [2, 2]
