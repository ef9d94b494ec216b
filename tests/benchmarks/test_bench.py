"""The benchmark's gates that no noise can move: operations, parity, saved keys and sizes; and what its rows claim."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks import limits, measure, report
from benchmarks.aside import DoesNotFit, Failed, aside
from benchmarks.bench import TRIED, jobs, measure_all
from benchmarks.compared import Bench, Setting
from benchmarks.measure import Measured, Schedule
from benchmarks.our_step import TECHNIQUES, OurStep, Settings
from benchmarks.pictures import Files, write_pictures
from benchmarks.published_step import PublishedStep
from benchmarks.report import Row
from benchmarks.rows import at_step, make_batch
from benchmarks.sizes import SIZES, build, projector_weights
from benchmarks.worker import Contender, Order, Worker
from ip_adapter_trainer.core.values import Batch
from ip_adapter_trainer.nn.lean import product_convolution
from ip_adapter_trainer.train.config import LeanConfig
from ip_adapter_trainer.train.lean import lean
from tests.nn.test_lean import lean_forwards

TINY, CPU, SIDE_PX = SIZES["tiny"], torch.device("cpu"), 32
Gradients = dict[str, Tensor]


@pytest.fixture(scope="module")
def batch() -> Batch:
    return make_batch(TINY, SIDE_PX, 2, CPU)


def published(precision: str) -> PublishedStep:
    return PublishedStep(build(TINY, CPU), projector_weights(TINY, CPU), precision, CPU)


def ours(precision: str, batch: Batch, settings: Settings | None = None) -> tuple[OurStep, Batch]:
    step = OurStep(TINY, build(TINY, CPU), projector_weights(TINY, CPU), precision, CPU, settings)
    encoded = replace(batch, inputs=step.encode(batch))
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


@pytest.mark.slow
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
    "technique",  # the optimizer comes after the gradients, CUDA graphs not on a CPU; compiling takes minutes
    [*(t for t in TRIED["cpu"] if t != "fused_optimizer"), pytest.param("compile", marks=pytest.mark.slow)],
)
def test_techniques_keep_the_gradients(technique: str, batch: Batch, reference: Path, tmp_path: Path) -> None:
    for settings in TECHNIQUES[technique]:
        step, encoded = ours("no", batch, settings)
        assert error(step.gradients(encoded), reference, tmp_path) <= 1e-5


def test_a_technique_is_measured_beside_a_step_that_lacks_nothing_else() -> None:
    for without, used in TECHNIQUES.values():
        settings = [ours_settings(part) for part in (without, used)]
        assert len([name for name in settings[0] if settings[0][name] != settings[1][name]]) == 1
    step = OurStep(TINY, build(TINY, CPU), projector_weights(TINY, CPU), "bf16", CPU)
    products = {t: [products_of(step, settings) for settings in TECHNIQUES[t]] for t in TECHNIQUES if t in TRIED["cpu"]}
    without, used = products.pop("product_convolutions")
    assert without == 0 < used
    assert all(without == used for without, used in products.values())


def ours_settings(settings: Settings) -> Settings:
    step = OurStep(TINY, build(TINY, "meta"), projector_weights(TINY, "meta"), "bf16", torch.device("meta"), settings)
    return step.config(Path("none")).model_dump()


def products_of(step: OurStep, settings: Settings) -> int:
    """Convolutions of the denoiser that are computed as products."""
    chosen = {name: value for name, value in settings.items() if name in LeanConfig.model_fields}
    with step.model.attached(), lean(step.model, LeanConfig(**chosen)):
        return lean_forwards(step.model.denoiser.net).count(product_convolution)


def test_every_technique_is_tried_on_some_device() -> None:
    assert {*TRIED["cpu"], *TRIED["cuda"]} == TECHNIQUES.keys()


def test_first_settings_of_all_sizes_come_before_further_ones() -> None:
    bench, parts = Bench("cuda", 3, Path("none")), ["settings", "largest", "techniques"]
    names = [name for name, _ in jobs(bench, ["tiny", "sd15", "sdxl"], parts, ["compile"])]
    assert names[:4] == ["the roof", "tiny 32 px batch 2", "sd15 512 px batch 1", "sdxl 1024 px batch 1"]
    assert names[-2:] == ["compile, sd15 512 px batch 1", "compile, sdxl 1024 px batch 1"]


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


def test_a_save_of_sd15_takes_13_times_the_bytes() -> None:
    theirs, mine = limits.checkpoint_bytes("sd15")
    assert theirs / mine >= 13


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> list[Measured]:
    """Both, compared in all ways at the tiny size."""
    folder = tmp_path_factory.mktemp("sides")
    files = Files(write_pictures(folder, SIDE_PX, 2), 2, SIDE_PX)
    pair = [Contender(side, "no", "tiny", SIDE_PX, 2, "cpu") for side in ("published", "ours")]
    return measure.compare(pair, Schedule(rounds=2, untimed=0, timed=1, files=files, saving=2), folder)


def test_sides_train_by_turns_in_their_own_processes(sides: list[Measured]) -> None:
    for side in sides:
        assert side.failure is None
        assert len(side.train_s) == len(side.prepare_s) == len(side.save_s) == 2
        assert min(side.train_s + side.prepare_s) > 0
        assert side.peak_bytes is not None and side.peak_bytes > 1e8
    assert not sides[0].waited and all(0 < share < 1 for share in sides[1].waited)


def test_what_is_counted_of_checkpoints_is_what_is_written(sides: list[Measured]) -> None:
    for side, counted in zip(sides, limits.checkpoint_bytes("tiny"), strict=True):
        assert side.save_bytes is not None and counted < side.save_bytes < counted + 70_000, "names, sizes, settings"


def test_our_side_holds_what_a_run_on_a_prepared_set_does(batch: Batch) -> None:
    vae = ours("no", batch)[0].model.codec.autoencoder
    assert vae.encoder is None and vae.decoder is not None


@pytest.mark.slow
def test_a_side_that_fails_says_why_and_the_other_goes_on(tmp_path: Path) -> None:
    wrong, right = (Contender("ours", "no", "tiny", SIDE_PX, 1, "cpu", s) for s in ({"no such": 1}, {}))
    failed, found = measure.compare((wrong, right), Schedule(rounds=1, untimed=0, timed=1), tmp_path)
    assert failed.failure is not None and "no such" in failed.failure and not failed.train_s
    assert found.failure is None and len(found.train_s) == 1
    bench = Bench("cpu", 1, tmp_path)
    rows = {row.name.split(",")[0]: row for row in bench._rows(Setting("tiny", 32, 1, "cpu"), failed, found, None)}
    assert rows[report.TIME].ours == found.train_s[0]
    assert rows[report.TIME].published is rows[report.TIME].ratio is None


@pytest.mark.slow
def test_the_largest_batch_is_found_by_whole_steps(tmp_path: Path) -> None:
    for side in ("published", "ours"):
        with Worker(Contender(side, "no", "tiny", SIDE_PX, 1, "cpu"), tmp_path) as worker:
            worker.ask("prepare")
            assert worker.ask("largest", (1, 3)) == 3
            worker.begin()
            assert worker.turn(Order(0, 1)).steps == 1


def test_trying_a_step_changes_no_weight(batch: Batch) -> None:
    step, encoded = ours("no", batch)
    before = {name: value.clone() for name, value in step.model.adapter.state_dict().items()}
    step.try_step(encoded)
    assert all(torch.equal(before[name], value) for name, value in step.model.adapter.state_dict().items())
    assert all(p.grad is None or not p.grad.any() for p in step.model.adapter.parameters())


def test_a_process_that_dies_or_raises_is_a_failure() -> None:
    with pytest.raises(Failed, match="died"):
        aside(os._exit, 1)
    with pytest.raises(Failed, match="ValueError: math domain error"):
        aside(math.sqrt, -1)


def too_large() -> None:
    raise torch.cuda.OutOfMemoryError("CUDA out of memory.\nTried to allocate much.")


def test_a_side_that_is_too_large_does_not_fit() -> None:
    with pytest.raises(DoesNotFit) as raised:
        aside(too_large)
    assert raised.value.reason == "does not fit (CUDA out of memory. Tried to allocate much.)"


def a_row(name: str, ours: float | None = 1.0, ratio: float | None = None, parity: float | None = 1e-2) -> Row:
    return Row(name, "cpu", None, ours, ratio, None, parity)


def test_what_is_known_is_kept_when_a_job_fails_or_time_is_up(tmp_path: Path) -> None:
    def of(name: str, then: object) -> Iterator[Row]:
        yield a_row(name)
        if callable(then):
            then()

    todo = (
        ("fails", partial(of, "first", partial(aside, os._exit, 1))),
        ("hangs", partial(of, "second", partial(aside, time.sleep, 600))),
        ("late", partial(of, "third", None)),
    )
    began = time.monotonic()
    measure_all(Bench("cpu", 1, tmp_path), todo, 15.0, tmp_path, ["command: none"])
    assert time.monotonic() - began < 60  # not the ten minutes
    assert [row["name"] for row in json.loads((tmp_path / "ratios.json").read_text())] == ["first", "second"]
    told = (tmp_path / "ratios.md").read_text()
    assert "- fails: its process died" in told
    assert "- hangs: not measured to the end" in told and "- late: not measured to the end" in told


def test_a_checkpoint_never_costs_less_than_nothing() -> None:
    theirs, mine = (Measured(Contender(side, "no", "tiny", 32, 1, "cpu"), 1) for side in ("published", "ours"))
    theirs.save_s, mine.save_s = [3.0, 1.0, 2.0], [-0.2, -0.1, 0.3]
    stall, noise = Bench("cpu", 3, Path("none"))._stall("tiny", theirs, mine, None)
    assert (stall.published, stall.ours, stall.ratio) == (2.0, 0.0, None)
    assert (noise.published, noise.ours) == (pytest.approx(1.0), pytest.approx(0.25))


def test_a_ratio_is_the_median_over_rounds_with_its_spread() -> None:
    assert measure.ratio_of([4.0, 9.0, 4.0, 4.0, 4.0], [2.0, 1.0, 2.0, 2.0, 2.0]) == (2.0, 0.0)
    middle, spread = measure.ratio_of([1.0, 2.0, 3.0], [1.0, 1.0, 1.0])
    assert (middle, spread) == (2.0, 0.5)


SETTING = "sd15 256 px batch 1"
TIMED = f"{report.TIME}, {SETTING}, published fp32"


def parity_rows(fp32: float, bf16: float, published: float | None) -> list[Row]:
    ratio = None if published is None else published / bf16
    return [a_row(f"{report.PARITY}, {SETTING}, fp32", fp32), a_row(f"{report.PARITY}, {SETTING}, bf16", bf16, ratio)]


def test_rows_have_the_promised_keys_and_know_their_targets(tmp_path: Path) -> None:
    rows = [a_row(TIMED, ratio=8.0), a_row(TIMED, ratio=7.0), *parity_rows(1e-6, 1e-2, 1e-2)]
    report.write(rows, tmp_path, ["command: none"])
    read = json.loads((tmp_path / "ratios.json").read_text())
    assert [set(row) for row in read] == [{"name", "device", "published", "ours", "ratio", "spread", "parity"}] * 4
    assert {f.name for f in fields(Row)} == set(read[0])
    assert [report.verdict(row, rows) for row in rows] == ["yes", "no", "yes", "yes"]
    assert "ratio >= 7.5 | yes |" in (tmp_path / "ratios.md").read_text()
    assert "ours <= 0.02; ratio >= 0.8333 | yes |" in (tmp_path / "ratios.md").read_text()


@pytest.mark.parametrize(
    ("parity", "expected"),
    [
        ((1e-6, 1.9e-2, 1.6e-2), "yes"),
        ((2e-5, 1e-2, 1e-2), "no"),
        ((1e-6, 2.1e-2, 2.1e-2), "no"),
        ((1e-6, 1.3e-2, 1.0e-2), "no"),
        ((1e-6, 1e-2, None), "no parity"),
    ],
    ids=["within", "fp32", "bf16", "over 1.2 times the published", "published unknown"],
)
def test_a_ratio_counts_only_beside_its_parity(parity: tuple[float, float, float | None], expected: str) -> None:
    row = a_row(TIMED, ratio=8.0)
    assert report.verdict(row, [row, *parity_rows(*parity)]) == expected


def test_without_parity_a_ratio_is_not_met() -> None:
    known = parity_rows(1e-6, 1e-2, 1e-2)
    rows = [a_row(TIMED, ratio=8.0), a_row(TIMED, ratio=8.0, parity=None)]
    assert report.verdict(rows[0], rows) == report.verdict(rows[0], [*rows, known[0]]) == "no parity"
    assert report.verdict(rows[1], [*rows, *known]) == "no parity"
    counted = a_row(f"{report.FLOPS}, sd15 512 px", ratio=1.9, parity=None)
    assert report.verdict(counted, [counted]) == "yes"


def test_memory_of_a_technique_is_no_target() -> None:
    assert not a_row(f"{report.TECHNIQUE_PEAK} lean_layers, {SETTING}").targets
    assert a_row(f"{report.PEAK}, {SETTING}, published fp32").targets
