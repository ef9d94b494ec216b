"""The benchmark's gates that no noise can move: operations, parity, saved keys and sizes; and that turns are taken."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks import limits, measure, report
from benchmarks.our_step import TECHNIQUES, OurStep
from benchmarks.published_step import PublishedStep
from benchmarks.report import Row
from benchmarks.rows import at_step, make_batch
from benchmarks.sizes import SIZES, build, projector_weights
from benchmarks.worker import Contender, Worker
from ip_adapter_trainer.core.types import Batch

TINY, CPU, SIDE_PX = SIZES["tiny"], torch.device("cpu"), 32
Gradients = dict[str, Tensor]


@pytest.fixture(scope="module")
def batch() -> Batch:
    return make_batch(TINY, SIDE_PX, 2, CPU)


def published(precision: str) -> PublishedStep:
    return PublishedStep(build(TINY, CPU), projector_weights(TINY, CPU), precision, CPU)


def ours(precision: str, batch: Batch, *techniques: str) -> tuple[OurStep, Batch]:
    step = OurStep(TINY, build(TINY, CPU), projector_weights(TINY, CPU), precision, CPU, techniques)
    encoded = replace(batch, picture=step.encode(batch))
    step.release_encoders()
    return step, encoded


@pytest.fixture(scope="module")
def reference(batch: Batch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(published("no").gradients(batch), tmp_path_factory.mktemp("reference"))


def saved(gradients: Gradients, folder: Path) -> Path:
    save_file({name: g.contiguous() for name, g in gradients.items()}, folder / "gradients.safetensors")
    return folder / "gradients.safetensors"


def error(gradients: Gradients, reference: Path, folder: Path) -> float:
    return measure.difference(saved(gradients, folder), reference)


def test_sd15_takes_185_and_sdxl_141_times_fewer_operations() -> None:
    for name, side_px, least in (("sd15", 512, 1.85), ("sdxl", 1024, 1.41)):
        theirs, mine = limits.count(name, side_px)
        assert theirs.total / mine.total >= least
        assert 0 < mine.attention < mine.total


def test_the_published_step_costs_what_it_is_known_to_cost() -> None:
    theirs, _ = limits.count("sd15", 512)
    assert 3.0e12 < theirs.total < 3.3e12  # 1,117 VAE, 335 image encoder, 13 text, about 1,700 UNet


def test_fp32_gradients_are_the_published_ones(batch: Batch, reference: Path, tmp_path: Path) -> None:
    step, encoded = ours("no", batch)
    assert error(step.gradients(encoded), reference, tmp_path) <= 1e-5


def test_bf16_gradients_are_no_worse_than_the_published_ones(batch: Batch, reference: Path, tmp_path: Path) -> None:
    step, encoded = ours("bf16", batch)
    mine = error(step.gradients(encoded), reference, tmp_path)
    theirs = error(published("bf16").gradients(batch), reference, tmp_path)
    assert 1e-4 < mine <= 2e-2, "rounding to bf16 must show, or something is compared with itself"
    assert mine <= 1.2 * theirs


@pytest.mark.parametrize(
    "technique",  # compiling takes minutes
    [pytest.param(t, marks=pytest.mark.slow) if t == "compile" else t for t in TECHNIQUES],
)
def test_techniques_keep_the_gradients(technique: str, batch: Batch, reference: Path, tmp_path: Path) -> None:
    step, encoded = ours("no", batch, technique)
    assert error(step.gradients(encoded), reference, tmp_path) <= 1e-5


def test_the_error_sees_other_noise_and_a_picture_that_is_not_dropped(
    batch: Batch, reference: Path, tmp_path: Path
) -> None:
    step, encoded = ours("no", batch)
    for wrong in (at_step(encoded, 1), replace(encoded, drop_image=torch.zeros(2, dtype=torch.bool))):
        assert error(step.gradients(wrong), reference, tmp_path) > 0.05


def test_nothing_is_compared_with_itself(reference: Path) -> None:
    with pytest.raises(AssertionError):
        measure.difference(reference, reference)


def test_a_published_save_holds_the_unet_and_drops_the_adapters_own_names(tmp_path: Path) -> None:
    step = published("no")
    step.save(tmp_path)
    keys = load_file(tmp_path / "model.safetensors").keys()
    assert any(key.startswith("unet.down_blocks") for key in keys)
    assert not any(key.startswith("adapter_modules") for key in keys)


def test_sides_train_by_turns_in_their_own_processes(tmp_path: Path) -> None:
    pair = tuple(Contender(side, "no", "tiny", SIDE_PX, 2, "cpu") for side in ("published", "ours"))
    theirs, mine = measure.compare((pair[0], pair[1]), measure.Schedule(rounds=2, untimed=0, timed=1), tmp_path)
    for side in (theirs, mine):
        assert len(side.train_s) == len(side.encode_s) == 2 and min(side.train_s + side.encode_s) > 0
        assert side.peak_bytes > 1e8 and side.save_s > 0
    assert theirs.save_bytes > 5 * mine.save_bytes
    assert (tmp_path / "ours-no-output" / "checkpoint-4" / "manifest.json").exists(), "3 turns and the last step"


def test_a_side_that_fails_says_why(tmp_path: Path) -> None:
    contender = Contender("ours", "no", "tiny", SIDE_PX, 1, "cpu", ("no such",))
    with Worker(contender, tmp_path) as worker, pytest.raises(RuntimeError, match="no such"):
        worker.ask("prepare")


def test_a_ratio_is_the_median_over_rounds_with_its_spread() -> None:
    assert measure.ratio_of([4.0, 9.0, 4.0, 4.0, 4.0], [2.0, 1.0, 2.0, 2.0, 2.0]) == (2.0, 0.0)
    middle, spread = measure.ratio_of([1.0, 2.0, 3.0], [1.0, 1.0, 1.0])
    assert (middle, spread) == (2.0, 0.5)


def test_rows_have_the_promised_keys_and_know_their_targets(tmp_path: Path) -> None:
    name = f"{report.TIME}, sd15 256 px batch 1, published fp32"
    rows = [Row(name, "cpu", 8.0, 1.0, 8.0, 0.01, 1e-2), Row(name, "cpu", 7.0, 1.0, 7.0, 0.01, 1e-2)]
    report.write(rows, tmp_path, ["command: none"])
    read = json.loads((tmp_path / "ratios.json").read_text())
    assert [set(row) for row in read] == [{"name", "device", "published", "ours", "ratio", "spread", "parity"}] * 2
    assert {f.name for f in fields(Row)} == set(read[0])
    assert [row.is_met for row in rows] == [True, False]
    assert "ratio >= 7.5 | yes |" in (tmp_path / "ratios.md").read_text()
