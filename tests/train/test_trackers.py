"""Trackers that fail or hang end neither a run nor each other."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

from ip_adapter_trainer.train import trackers
from ip_adapter_trainer.train.trackers import Trackers


class Tracker:
    """One that keeps what it is told."""

    name = "kept"

    def __init__(self) -> None:
        self.told: list[Any] = []

    def log(self, value: int) -> None:
        """Keeps it."""
        self.told.append(value)

    def finish(self) -> None:
        """The last thing it is told."""
        self.told.append("finished")


class Failing(Tracker):
    """One whose disk is full."""

    name = "full"

    def log(self, value: int) -> None:
        """Fails at the second report."""
        super().log(value)
        if len(self.told) == 2:
            raise OSError(28, "No space left on device")


class Hanging(Tracker):
    """One that waits for ever."""

    name = "hung"

    def log(self, value: int) -> None:
        """Never returns."""
        threading.Event().wait()


def taken_over(*those: Tracker) -> tuple[Trackers, Any]:
    """Trackers, and the accelerator that had them."""
    accelerator = SimpleNamespace(trackers=list(those))
    return Trackers(accelerator), accelerator


def test_one_that_fails_is_told_of_and_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    failing, kept = Failing(), Tracker()
    served, accelerator = taken_over(failing, kept)
    assert accelerator.trackers == []
    for value in range(4):
        served.report(lambda tracker, value=value: tracker.log(value))  # type: ignore[misc]
    served.close()
    assert failing.told == [0, 1] and kept.told == [0, 1, 2, 3, "finished"]
    assert capsys.readouterr().err.count("the tracker full failed and gets nothing more") == 1


def test_one_that_hangs_is_left_behind(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(trackers, "_WAITING", 3)
    monkeypatch.setattr(trackers, "_PATIENCE_S", 0.2)
    served, _ = taken_over(Hanging())
    began = time.monotonic()
    for value in range(20):
        served.report(lambda tracker, value=value: tracker.log(value))  # type: ignore[misc]
    served.close()
    assert time.monotonic() - began < 5
    assert capsys.readouterr().err.count("hangs and gets nothing more") == 1
