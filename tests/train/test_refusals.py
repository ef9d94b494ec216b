"""What a disk refuses in the middle of a write ends no run, and a stop that was not saved is not told as saved."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ip_adapter_trainer.core.errors import Stopped, StorageProblem
from ip_adapter_trainer.storage.checkpoints import all_checkpoints
from ip_adapter_trainer.storage.lines import Lines
from ip_adapter_trainer.train import checkpoint, validate
from ip_adapter_trainer.train.saver import Saver
from ip_adapter_trainer.train.validate import Validator
from tests.disks import limited


class Card:
    """Of an adapter."""

    def to_json(self) -> str:
        """Nothing."""
        return "{}"


def snapshot(step: int, weights: int = 10, tensors: int = 10) -> checkpoint.Snapshot:
    """One with so many numbers in either file."""
    card: Any = Card()
    return checkpoint.Snapshot(step, {"w": torch.zeros(weights)}, card, {"t": torch.zeros(tensors)}, {})


@pytest.mark.parametrize(("weights", "tensors"), [(30_000, 10), (10, 30_000)], ids=["torch.save", "safetensors"])
def test_a_disk_that_fills_up_during_a_write_leaves_no_checkpoint(tmp_path: Path, weights: int, tensors: int) -> None:
    with limited(40_000), pytest.raises(StorageProblem, match="the checkpoint was not saved"):
        checkpoint.write(tmp_path, snapshot(1, weights, tensors))
    assert not list(tmp_path.iterdir())
    checkpoint.write(tmp_path, snapshot(1, weights, tensors))
    assert len(all_checkpoints(tmp_path)) == 1


def test_a_folder_that_vanished_is_made_again(tmp_path: Path) -> None:
    assert checkpoint.write(tmp_path / "gone", snapshot(1)).exists()


def test_what_is_not_removed_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (1, 2):
        checkpoint.write(tmp_path, snapshot(step))

    def refuse(self: Path, target: Path) -> Path:
        raise OSError(30, os.strerror(30))

    monkeypatch.setattr(Path, "rename", refuse)
    checkpoint.prune(tmp_path / "checkpoint-2", 1)
    assert len(all_checkpoints(tmp_path)) == 2 and "was not removed" in capsys.readouterr().err


def test_a_stop_that_cannot_be_saved_is_not_told_as_saved(
    run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stops(self: Validator, done: int, track: object, poll: Callable[[], None]) -> None:
        signal.raise_signal(signal.SIGTERM)
        poll()

    monkeypatch.setattr(Validator, "__call__", stops)
    monkeypatch.setattr(checkpoint, "_check_room", lambda *_: (_ for _ in ()).throw(OSError(28, os.strerror(28))))
    with pytest.raises(StorageProblem, match="No space left"):
        run(tmp_path / "out", validation_steps=1)


def test_a_validation_that_is_broken_off_leaves_no_numbers(
    run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = run(tmp_path / "whole", validation_steps=2), tmp_path / "broken"
    honest = Validator.__call__

    def stops(self: Validator, done: int, track: Any, poll: Callable[[], None]) -> None:
        honest(self, done, track, poll)
        signal.raise_signal(signal.SIGTERM)
        poll()

    with monkeypatch.context() as patched:
        patched.setattr(Validator, "__call__", stops)
        with pytest.raises(Stopped, match="143"):
            run(broken, validation_steps=2)
    rows = [json.loads(line) for line in (broken / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    run(broken, validation_steps=2, resume_from_checkpoint="latest")
    assert (broken / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


def test_a_grid_that_is_not_saved_does_not_end_the_run(
    run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Unsaved:
        """A picture."""

        def save(self, path: Path) -> None:
            """As on a full disk."""
            path.write_bytes(b"half")
            raise OSError(28, os.strerror(28))

    monkeypatch.setattr(validate, "validation_grid", lambda *_, **__: Unsaved())
    output = run(tmp_path / "out", max_train_steps=1, grid_rows=1)
    assert "the grid was not saved: No space left" in capsys.readouterr().err
    assert not list((output / "grids").iterdir()) and len(all_checkpoints(output)) == 1


def test_metrics_that_a_disk_refused_to_the_end_are_written_when_the_last_save_is(
    run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full, write, finish = [True], Lines._write, Saver.finish

    def refuse(self: Lines) -> None:
        if full[0]:
            raise OSError(28, os.strerror(28))
        write(self)

    def make_room(self: Saver) -> None:
        full[0] = False
        finish(self)

    monkeypatch.setattr(Lines, "_write", refuse)
    monkeypatch.setattr(Saver, "finish", make_room)
    output = run(tmp_path / "out", max_train_steps=2)
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "lr" in row] == [1, 2]
