"""Savers and trackers that a disk or a program refuses: training goes on."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, get_available_trackers

from ip_adapter_trainer.config import parse_train
from ip_adapter_trainer.core.errors import Problem, StorageProblem
from ip_adapter_trainer.runtime.launch import Runtime
from ip_adapter_trainer.train import checkpoint, saver, trackers
from ip_adapter_trainer.train.saver import Saver
from ip_adapter_trainer.train.trackers import Trackers, start_trackers, trackers_named


def snapshot(step: int) -> Any:
    return SimpleNamespace(step=step)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Written steps, and whether the disk is full."""
    disk = SimpleNamespace(full=False, written=[])

    def write(output: Path, taken: Any) -> None:
        if disk.full:
            raise StorageProblem("full")
        disk.written.append(taken.step)

    monkeypatch.setattr(checkpoint, "write", write)
    monkeypatch.setattr(checkpoint, "prune", lambda newest, keep: None)
    monkeypatch.setattr(saver, "RETRY_S", 0.0)
    return disk


def test_a_refused_checkpoint_is_told_once_and_tried_until_it_is_written(disk: Any, tmp_path: Path) -> None:
    disk.full, kept = True, Saver(tmp_path, None)
    kept.start(snapshot(1))
    with pytest.raises(StorageProblem):
        kept.settle()
    for _ in range(3):
        kept.check()
        kept.settle()  # the same refusal again is not told
    disk.full = False
    kept.check()
    kept.settle()
    assert disk.written == [1]
    kept.finish()
    assert disk.written == [1], "nothing is left to write"


def test_a_newer_checkpoint_takes_the_place_of_a_refused_one(disk: Any, tmp_path: Path) -> None:
    disk.full, kept = True, Saver(tmp_path, None)
    kept.start(snapshot(1))
    with pytest.raises(StorageProblem):
        kept.settle()
    disk.full = False
    kept.start(snapshot(2))
    kept.finish()
    assert disk.written == [2]


def test_the_last_checkpoint_is_tried_once_more_before_the_end(disk: Any, tmp_path: Path) -> None:
    disk.full, kept = True, Saver(tmp_path, None)
    kept.start(snapshot(9))
    with pytest.raises(StorageProblem):
        kept.finish()
    disk.full = False
    kept.finish()
    assert disk.written == [9]


class _Tracker:
    def __init__(self, name: str, log: Any) -> None:
        self.name, self._log, self.got = name, log, []

    def log(self, values: Any, step: int) -> None:
        self._log(values)
        self.got.append(step)

    def finish(self) -> None:
        self.got.append(-1)


def test_a_tracker_that_fails_is_told_of_and_left_behind(capsys: pytest.CaptureFixture[str]) -> None:
    def fails(values: Any) -> None:
        raise OSError(28, "No space left on device")

    bad, good = _Tracker("bad", fails), _Tracker("good", lambda values: None)
    accelerator = SimpleNamespace(trackers=[bad, good])
    served = Trackers(accelerator)
    for step in (1, 2):
        served.report(lambda tracker, step=step: tracker.log({}, step=step))
    served.close()
    assert good.got == [1, 2, -1] and bad.got == [] and accelerator.trackers == []
    assert capsys.readouterr().err.count("tracker bad failed") == 1


def test_a_tracker_that_hangs_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "_PATIENCE_S", 0.1)
    monkeypatch.setattr(trackers, "_WAITING", 3)
    freed = threading.Event()
    served = Trackers(SimpleNamespace(trackers=[_Tracker("slow", lambda values: freed.wait(20))]))
    for step in range(20):
        served.report(lambda tracker, step=step: tracker.log({}, step=step))
    served.close()
    freed.set()


@pytest.mark.parametrize(
    ("report_to", "names"),
    [("none", ()), ("tensorboard", ("tensorboard",)), ("tensorboard,tensorboard", ("tensorboard",))],
)
def test_trackers_are_named(report_to: str, names: tuple[str, ...]) -> None:
    assert trackers_named(report_to) == names


def test_all_trackers_are_those_that_are_installed() -> None:
    assert set(trackers_named("all")) == {str(name) for name in get_available_trackers()} >= {"tensorboard"}


@pytest.mark.parametrize(
    ("report_to", "told"),
    [
        ("clearml", "clearml is not installed(?s:.*)pip install clearml, or give --report_to none"),
        ("tensorboard,clearml", "clearml is not installed"),
        ("tensorbord", "unknown tracker 'tensorbord'(?s:.*)did you mean 'tensorboard'"),
    ],
)
def test_a_tracker_that_is_not_there_is_refused(report_to: str, told: str) -> None:
    with pytest.raises(Problem, match=told):
        trackers_named(report_to)


class _LoggedOut(GeneralTracker):
    """As one without a login."""

    name, requires_logging_directory, tracker = "logged_out", False, None

    def start(self) -> None:
        raise ConnectionError("no API key\nrun login")


def test_a_tracker_that_does_not_start_is_no_bug(flags: Any, tmp_path: Path) -> None:
    runtime = Runtime(Accelerator(cpu=True, log_with=[_LoggedOut()]), 0, 1, torch.device("cpu"), "no")
    with pytest.raises(Problem, match="a tracker did not start: ConnectionError: no API key") as refused:
        start_trackers(runtime, parse_train(flags(tmp_path / "out")), {})
    assert refused.value.exit_code == 2
