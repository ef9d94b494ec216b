"""A run that goes back, or on from elsewhere, ends with what was trained last, and what stood there before is kept."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from faults.corpus.documents import sign
from ip_adapter_trainer.adapter_files import read_adapter
from ip_adapter_trainer.adapter_files.file import find_weights
from ip_adapter_trainer.config import parse_train, write_resolved
from ip_adapter_trainer.core.errors import Problem, StorageProblem
from ip_adapter_trainer.core.values import Batch
from ip_adapter_trainer.export import ExportConfig, export
from ip_adapter_trainer.runtime.launch import claimed
from ip_adapter_trainer.storage import checkpoints
from ip_adapter_trainer.storage.checkpoints import all_checkpoints, sha256_of
from ip_adapter_trainer.train import checkpoint
from ip_adapter_trainer.train import run as running
from ip_adapter_trainer.train.aside import lies_in, set_aside
from ip_adapter_trainer.train.config import CheckpointConfig, OptimConfig
from ip_adapter_trainer.train.metrics import cut_metrics
from ip_adapter_trainer.train.restored import length_settings
from ip_adapter_trainer.train.run_plan import _warmup_steps
from ip_adapter_trainer.train.starting import starting_point
from ip_adapter_trainer.train.step import Step
from tests import tiny
from tests.train.test_refusals import snapshot
from tests.train.test_resume import launched


def names(output: Path) -> list[str]:
    return [folder.name for folder in all_checkpoints(output)]


def rows(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def steps(output: Path) -> list[int]:
    return [row["step"] for row in rows(output) if "lr" in row]


def rates(output: Path) -> list[float]:
    return [row["lr"] for row in rows(output) if "lr" in row]


def content(folder: Path) -> dict[str, bytes]:
    """Every file but the lock, which a run that is refused late leaves."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != ".lock")
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def damage(folder: Path) -> None:
    file = folder / checkpoint.TENSORS
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    file.write_bytes(damaged)


@pytest.fixture(scope="module")
def made(flags: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps with checkpoints 2 and 4 and a grid of step 4."""
    output = tmp_path_factory.mktemp("made") / "run"
    running.train(parse_train(flags(output, grid_rows=1, grid_steps=1)), write_resolved)
    return output


@pytest.fixture
def first(made: Path, tmp_path: Path) -> Path:
    """A copy of that run."""
    return shutil.copytree(made, tmp_path / "run")


def test_going_back_keeps_what_was_trained_last_and_what_was_before(
    run: Callable, first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before, aside = content(first), first / "set-aside-1"
    run(first, resume_from_checkpoint="checkpoint-2", max_train_steps=3, learning_rate=1e-4)
    assert names(first) == ["checkpoint-2", "checkpoint-3"] and steps(first) == [1, 2, 3]
    assert find_weights(first) == first / "checkpoint-3" / checkpoint.WEIGHTS and read_adapter(first).step == 3
    kept = [name for name in before if name.startswith(("checkpoint-4/", "grids/"))] + ["metrics.jsonl"]
    assert content(aside) == {name: before[name] for name in kept}
    told = f"checkpoint-4 is newer than checkpoint-2, from which this run goes on: kept in {aside}; "
    assert told in capsys.readouterr().err
    assert read_adapter(aside).step == 4
    export(ExportConfig(source=str(aside / "checkpoint-4"), output=str(tmp_path / "abandoned.safetensors")))

    run(first, resume_from_checkpoint="latest", max_train_steps=5, learning_rate=1e-4)
    assert names(first)[-1] == "checkpoint-5" and steps(first) == [1, 2, 3, 4, 5]
    assert "set aside" not in capsys.readouterr().err and not (first / "set-aside-2").exists()

    run(first, resume_from_checkpoint=aside / "checkpoint-4", max_train_steps=6)
    assert names(first) == ["checkpoint-6"] and steps(first) == [5, 6] and read_adapter(first).step == 6
    assert names(first / "set-aside-2") == ["checkpoint-2", "checkpoint-3", "checkpoint-4", "checkpoint-5"]
    assert steps(first / "set-aside-2") == [1, 2, 3, 4, 5] and names(aside) == ["checkpoint-4"]
    assert "checkpoint-2 to checkpoint-5 (4) are not of the line of" in capsys.readouterr().err


def test_going_back_under_a_limit_removes_no_new_checkpoint(run: Callable, first: Path, tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", max_train_steps=3)
    limits = {"checkpoints_total_limit": 1, "save_steps": 1}
    run(first, resume_from_checkpoint=first / "checkpoint-2", max_train_steps=3, **limits)
    assert names(first) == ["checkpoint-3"] and names(first / "set-aside-1") == ["checkpoint-4"]
    for name in (checkpoint.WEIGHTS, checkpoint.TENSORS):
        assert (first / "checkpoint-3" / name).read_bytes() == (whole / "checkpoint-3" / name).read_bytes()
    assert (first / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


def test_going_on_from_another_folder_twice_leaves_one_line_and_whole_metrics(
    run: Callable, made: Path, tmp_path: Path
) -> None:
    output, parent = tmp_path / "run", made / "checkpoint-2"
    run(output, resume_from_checkpoint=parent, max_train_steps=4, save_steps=1)
    assert names(output) == ["checkpoint-3", "checkpoint-4"] and steps(output) == [3, 4]
    run(output, resume_from_checkpoint=parent, max_train_steps=3, save_steps=1, learning_rate=1e-4)
    assert names(output) == ["checkpoint-3"] and steps(output) == [3] and read_adapter(output).step == 3
    assert names(output / "set-aside-1") == ["checkpoint-3", "checkpoint-4"]
    assert steps(output / "set-aside-1") == [3, 4]
    run(output, resume_from_checkpoint="latest", max_train_steps=4)
    assert steps(output) == [3, 4] and names(output) == ["checkpoint-3", "checkpoint-4"]


def test_a_damaged_newest_checkpoint_is_set_aside_and_does_not_stop_pruning(run: Callable, first: Path) -> None:
    damage(first / "checkpoint-4")
    run(first, resume_from_checkpoint="latest", max_train_steps=6, save_steps=1, checkpoints_total_limit=2)
    assert names(first) == ["checkpoint-5", "checkpoint-6"] and names(first / "set-aside-1") == ["checkpoint-4"]
    assert steps(first) == [1, 2, 3, 4, 5, 6]


def test_where_all_are_damaged_a_run_begins_afresh_and_keeps_them(
    run: Callable, first: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in all_checkpoints(first):
        damage(folder)
    run(first, resume_from_checkpoint="latest", max_train_steps=1)
    assert names(first) == ["checkpoint-1"] and steps(first) == [1]
    assert names(first / "set-aside-1") == ["checkpoint-2", "checkpoint-4"] and steps(first / "set-aside-1")[-1] == 4
    assert "checkpoint-2 and checkpoint-4 are not whole, and this run begins afresh: kept" in capsys.readouterr().err


@pytest.mark.parametrize(("keep", "left"), [
    (1, [5, 9]), (2, [3, 4, 5, 9]), (3, [2, 3, 4, 5, 9]), (4, [1, 2, 3, 4, 5, 9]), (None, [1, 2, 3, 4, 5, 9]),
])  # fmt: skip
def test_pruning_counts_whole_checkpoints_up_to_the_one_just_written(
    tmp_path: Path, keep: int | None, left: list[int]
) -> None:
    for step in (1, 2, 3, 4, 5, 9):
        checkpoint.write(tmp_path, snapshot(step))
    (tmp_path / "checkpoint-4" / checkpoint.TENSORS).write_bytes(b"torn")
    checkpoint.prune(tmp_path / "checkpoint-5", keep)
    assert names(tmp_path) == [f"checkpoint-{step}" for step in left]
    checkpoint.prune(tmp_path / "checkpoint-4", 1)  # as if the disk had not kept what was just written
    assert names(tmp_path) == [f"checkpoint-{step}" for step in left]


def test_a_resumed_run_asks_for_no_file_to_start_from(
    run: Callable, first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = first / "checkpoint-4" / checkpoint.WEIGHTS
    output, gone = tmp_path / "second", tmp_path / "gone.bin"
    shutil.copy(file, gone)
    run(output, pretrained_ip_adapter_path=gone, resume_from_checkpoint="latest", max_train_steps=1)
    assert f"starting from {gone}" in capsys.readouterr().err
    gone.unlink()
    run(output, pretrained_ip_adapter_path=gone, resume_from_checkpoint="latest", max_train_steps=2)
    assert f"{gone} is not read: the weights are those of checkpoint-1" in capsys.readouterr().err
    assert names(output)[-1] == "checkpoint-2"


def test_nothing_left_to_train_is_told_and_changes_nothing(
    run: Callable, first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = content(first)
    with monkeypatch.context() as patched:
        patched.setattr(running, "make_model", lambda *_: pytest.fail("loaded"))
        run(first, resume_from_checkpoint="latest")
        said = capsys.readouterr().err
        assert "checkpoint-4 is at step 4, and the run has 4 steps; give --max_train_steps above 4" in said
        run(first, resume_from_checkpoint="checkpoint-2", max_train_steps=2)
        run(first, resume_from_checkpoint="checkpoint-4", max_train_steps=3)
        run(tmp_path / "new", resume_from_checkpoint=first / "checkpoint-4")
        assert capsys.readouterr().err.count("nothing left to train") == 3
    assert content(first) == before and not (tmp_path / "new").exists()


def test_a_last_validation_that_is_due_is_done_though_nothing_is_left_to_train(run: Callable, first: Path) -> None:
    shutil.rmtree(first / "checkpoint-4")
    before, wanted = content(first), {"resume_from_checkpoint": "latest", "max_train_steps": 2}
    for _ in range(2):
        run(first, **wanted)
        assert steps(first) == [1, 2] and [row["step"] for row in rows(first) if "lr" not in row] == [2]
    changed = {name for name, value in content(first).items() if before.get(name) != value}
    assert changed == {"metrics.jsonl"} and content(first).keys() == before.keys()


class Enough(Exception):
    """Steps have been taken."""


def rates_of_two_steps(run: Callable, output: Path, patched: pytest.MonkeyPatch, **more: object) -> list[float]:
    """Learning rates of the two steps after checkpoint-4, as a run of 200 steps takes them."""
    honest, calls = Step.__call__, []

    def two(self: Step, batch: Batch) -> Any:
        calls.append(batch)
        if len(calls) > 2:
            raise Enough
        return honest(self, batch)

    with patched.context() as patch, pytest.raises(Enough):
        patch.setattr(Step, "__call__", two)
        run(output, resume_from_checkpoint="checkpoint-4", max_train_steps=200, save_steps=100, **more)
    return rates(output)[-2:]


def test_a_warm_up_is_as_long_as_when_the_run_began(
    run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = run(tmp_path / "run", max_train_steps=20, save_steps=4, num_validation_images=0)
    assert rates(output)[:4] == [0, 5e-4, 1e-3, 1e-3]
    go_on = partial(rates_of_two_steps, run, output, monkeypatch, num_validation_images=0)
    assert go_on() == [1e-3, 1e-3]
    assert checkpoint.read(output / "checkpoint-6").state["warmup_steps"] == 2
    assert go_on(lr_warmup_steps=8) == [pytest.approx(5e-4), pytest.approx(6.25e-4)]
    assert checkpoint.read(output / "checkpoint-6").state["warmup_steps"] == 8
    old = output / "checkpoint-4"
    saved = json.loads((old / checkpoint.STATE).read_text())
    del saved["state"]["warmup_steps"]
    (old / checkpoint.STATE).write_text(json.dumps(saved | {"state": saved["state"] | {"metrics_bytes": 123}}))
    sign(old)
    assert go_on() == [1e-3, 1e-3]


@pytest.mark.parametrize(("then", "more", "expected"), [
    ({"max_train_steps": 40}, {}, 4), ({"lr_warmup_steps": 3}, {}, 3), ({}, {}, 30), ({}, {"row_sums": None}, 60),
    ({"num_train_epochs": 2**61}, {}, 500), ({"max_train_steps": 40}, {"warmup_steps": 7}, 7),
])  # fmt: skip
def test_the_warm_up_of_an_old_checkpoint_follows_from_its_settings(
    then: dict[str, Any], more: dict[str, Any], expected: int
) -> None:
    state = {"config": {"max_train_steps": None} | then, "images_per_step": 2, "row_sums": {"rows": 6}} | more
    assert _warmup_steps(OptimConfig(max_train_steps=999), 999, 12, state) == expected


@pytest.mark.parametrize("settings", [{"max_train_steps": "x"}, {"max_train_steps": 0}, {"lr_warmup_steps": 10**400}])
def test_settings_of_no_run_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(Problem, match="settings are no run's"):
        length_settings({"config": settings})


def test_a_refused_resume_changes_nothing(
    run: Callable, first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage(first / "checkpoint-4")
    before, other = content(first), tiny.make_encoder(tmp_path / "other", seed=2)
    asked = {"resume_from_checkpoint": "checkpoint-2", "max_train_steps": 6}
    with pytest.raises(Problem, match="before: image_encoder"):
        run(first, image_encoder_path=other, **asked)
    monkeypatch.setattr(running, "make_model", lambda *_: pytest.fail("loaded"))
    for wrong, said in (
        ({"seed": 7}, "seed was 0, is 7"),
        ({"resume_from_checkpoint": "checkpoint-4"}, "the checkpoint is damaged"),
        ({"resume_from_checkpoint": first}, "no checkpoint that can be resumed"),
        ({"resume_from_checkpoint": "checkpoint-3"}, f"no such checkpoint(.|\n)*give {first}/checkpoint-2$"),
        ({"resume_from_checkpoint": "x" * 999}, f"no such checkpoint(.|\n)*give {first}/checkpoint-2$"),
    ):
        with pytest.raises(Problem, match=said):
            run(first, **(asked | wrong))
    assert content(first) == before


@pytest.mark.parametrize(("asked", "near"), [
    ("checkpoint-7", "{0}/checkpoint-6 or {0}/checkpoint-10"), ("elsewhere/checkpoint-99", "{0}/checkpoint-10"),
    ("checkpoint-1", "{0}/checkpoint-2"), ("best", "{0}/checkpoint-10"),
])  # fmt: skip
def test_a_checkpoint_that_is_not_there_is_told_with_those_next_to_it(tmp_path: Path, asked: str, near: str) -> None:
    for step in (2, 6, 10, 12):
        checkpoint.write(tmp_path, snapshot(step))
    (tmp_path / "checkpoint-12" / checkpoint.MANIFEST).unlink()
    with pytest.raises(Problem, match="no such checkpoint") as caught:
        starting_point(CheckpointConfig(output_dir=str(tmp_path), resume_from_checkpoint=asked))
    assert caught.value.fault.remedy == f"give {near.format(tmp_path)}"


def test_where_there_is_no_checkpoint_the_ways_on_are_told(tmp_path: Path) -> None:
    with pytest.raises(Problem, match="give the path of a checkpoint-N folder, or latest to begin afresh"):
        starting_point(CheckpointConfig(output_dir=str(tmp_path), resume_from_checkpoint="checkpoint-1"))


def test_a_checkpoint_is_read_twice_at_most(run: Callable, first: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[Path] = []
    monkeypatch.setattr(checkpoints, "sha256_of", lambda file: (hashed.append(file), sha256_of(file))[1])
    run(first, resume_from_checkpoint="latest", max_train_steps=5)
    assert len(hashed) == 2 * len(checkpoint.FILES), "when it is chosen, and when it is taken up"


def test_what_another_run_saved_while_this_one_was_loading_is_left_alone(
    run: Callable, first: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_late(*given: Any) -> Any:
        shutil.copytree(made / "checkpoint-4", first / "checkpoint-5")
        return claimed(*given)

    monkeypatch.setattr(running, "claimed", too_late)
    with pytest.raises(Problem, match="another run has written checkpoints here"):
        run(first, resume_from_checkpoint="latest", max_train_steps=6)
    assert names(first) == ["checkpoint-2", "checkpoint-4", "checkpoint-5"]


def stands(folder: Path, *grids: int) -> None:
    """Checkpoints 2, 4 and 6 and metrics, by their names alone, and some grids."""
    for step in (2, 4, 6):
        (folder / f"checkpoint-{step}").mkdir(parents=True)
        (folder / f"checkpoint-{step}" / "file").write_text(str(step))
    (folder / "metrics.jsonl").write_text("lines")
    (folder / "grids").mkdir()
    for step in grids:
        (folder / "grids" / f"step-{step:07d}.png").write_text(str(step))


@pytest.mark.parametrize("after", range(6))
def test_a_kill_while_checkpoints_are_set_aside_loses_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    output, rename, done = tmp_path / "run", Path.rename, []
    stands(output, 2, 4, 6)

    def dies(path: Path, target: Path) -> Path:
        if len(done) == after:
            raise KeyboardInterrupt
        done.append(path)
        return rename(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", dies)
        if after < 5:
            with pytest.raises(KeyboardInterrupt):
                set_aside(output, output / "checkpoint-2", 2)
            newest = [folder.name for folder in all_checkpoints(output)][-1]
            assert newest == "checkpoint-6", "until all others have moved"
    set_aside(output, output / "checkpoint-2", 2)
    assert names(output) == ["checkpoint-2"] and [file.name for file in output.glob("grids/*")] == ["step-0000002.png"]
    for name in ("checkpoint-4", "checkpoint-6", "grids/step-0000004.png", "grids/step-0000006.png"):
        assert len(list(output.glob(f"set-aside-*/{name}"))) == 1
    assert "lines" in [file.read_text() for file in output.glob("set-aside-*/metrics.jsonl")]


def test_a_disk_that_refuses_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stands(tmp_path)

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", refuse)
    with pytest.raises(StorageProblem, match="cannot set checkpoints aside: No space left"):
        set_aside(tmp_path, tmp_path / "checkpoint-2", 2)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert not list(tmp_path.glob("*set-aside*"))


def test_a_checkpoint_is_a_runs_own_whatever_links_lead_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stands(tmp_path / "run")
    (tmp_path / "link").symlink_to(tmp_path / "run")
    (tmp_path / "best").symlink_to(tmp_path / "run" / "checkpoint-2")
    (tmp_path / "run" / "checkpoint-7").symlink_to(tmp_path / "large")
    own = ["run/checkpoint-2", "link/checkpoint-2", "best", "run/checkpoint-7"]
    assert all(lies_in(tmp_path / name, tmp_path / where) for name in own for where in ("run", "link"))
    monkeypatch.chdir(tmp_path / "run")
    assert lies_in(Path("checkpoint-2"), Path("../link")) and lies_in(Path("checkpoint-2"), Path())
    assert not lies_in(tmp_path / "run" / "set-aside-1" / "checkpoint-2", tmp_path / "run")


STEP, EVENT = '{"step": %d, "loss": 1.0, "lr": 0.1}\n', '{"step": %d, "validation/loss": 1.0}\n'


@pytest.mark.parametrize(("step", "validated", "kept"), [
    (-1, -1, 0), (1, -1, 1), (2, 2, 3), (2, -1, 2), (2, 1, 2), (3, 2, 4), (4, 2, 6), (4, 4, 7), (99, 4, 7),
])  # fmt: skip
def test_metrics_are_cut_by_step(tmp_path: Path, step: int, validated: int, kept: int) -> None:
    lines = [STEP % 1, STEP % 2, EVENT % 2, STEP % 3, "torn by a kill\n", STEP % 4, EVENT % 4]
    (tmp_path / "metrics.jsonl").write_text("".join(lines) + '["no line of ours"]\n' + (STEP % 5)[:-1])
    cut_metrics(tmp_path, step, validated)
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(lines[:kept])


def test_no_metrics_and_what_is_no_file_of_them(tmp_path: Path) -> None:
    cut_metrics(tmp_path, 3, 3)
    assert not list(tmp_path.iterdir())
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(Problem, match="no regular file"):
        cut_metrics(tmp_path, 3, 3)


def test_two_processes_go_back_alike(flags: Callable, first: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = {"timestep_density": "logit_normal", "optimizer": "muon", "train_batch_size": 1, "save_steps": 1}
    own |= {"checkpoints_total_limit": 1}
    process = launched(flags(first, resume_from_checkpoint="checkpoint-2", max_train_steps=4, **own))
    out, _ = process.communicate()
    assert process.returncode == 0 and out.count("kept in") == 1, out[-3000:]
    assert names(first) == ["checkpoint-4"] and steps(first) == [1, 2, 3, 4]
    assert names(first / "set-aside-1") == ["checkpoint-4"]
