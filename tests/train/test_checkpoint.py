"""Checkpoints exist whole or not at all, and the last good one is never removed."""

from __future__ import annotations

import os
import shutil
import threading
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ip_adapter_trainer.core.errors import Problem, StorageProblem
from ip_adapter_trainer.core.values import Batch
from ip_adapter_trainer.storage.checkpoints import all_checkpoints
from ip_adapter_trainer.storage.staging import lock
from ip_adapter_trainer.train import checkpoint
from ip_adapter_trainer.train.step import Step
from ip_adapter_trainer.train.tree import flatten, unflatten


def test_only_what_was_trained_is_saved_under_the_published_keys(run: Callable, tmp_path: Path) -> None:
    output = run(tmp_path / "out", max_train_steps=1)
    state = torch.load(output / "checkpoint-1" / checkpoint.WEIGHTS, weights_only=True)
    prefixes = {key.split(".")[0] for key in state}
    assert prefixes == {"image_proj_model", "adapter_modules"}
    assert {"image_proj_model.proj.weight", "adapter_modules.1.to_k_ip.weight"} <= state.keys()
    assert all(value.dtype == torch.float32 for value in state.values())


def test_rotation_keeps_the_newest(run: Callable, tmp_path: Path) -> None:
    output = run(tmp_path / "out", max_train_steps=5, save_steps=1, checkpoints_total_limit=2)
    assert [p.name for p in all_checkpoints(output)] == ["checkpoint-4", "checkpoint-5"]
    assert not list(output.glob(".*removing*"))


def test_rotation_removes_nothing_while_the_newest_is_damaged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (1, 2):
        (tmp_path / f"checkpoint-{step}").mkdir()
    checkpoint.prune(tmp_path / "checkpoint-2", 1)
    assert len(all_checkpoints(tmp_path)) == 2
    assert "checkpoint-2 is not on the disk as it was written" in capsys.readouterr().err


def test_a_full_disk_is_reported_and_training_goes_on(
    run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = namedtuple("usage", "total used free")
    real, calls = shutil.disk_usage, []

    def full_at_first(path: object) -> object:
        calls.append(path)
        return usage(10, 10, 0) if len(calls) == 1 else real(str(path))

    monkeypatch.setattr(checkpoint.shutil, "disk_usage", full_at_first)
    output = run(tmp_path / "out")
    assert [p.name for p in all_checkpoints(output)] == ["checkpoint-4"]
    assert "a checkpoint needs" in capsys.readouterr().err


def test_a_full_disk_at_the_last_step_is_an_error(
    run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage(10, 10, 0))
    with pytest.raises(StorageProblem, match="a checkpoint needs"):
        run(tmp_path / "out", max_train_steps=1)


def test_a_save_that_breaks_off_leaves_no_checkpoint(
    run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(checkpoint, "save_file", refuse)
    with pytest.raises(StorageProblem, match="No space left"):
        run(tmp_path / "out", max_train_steps=1)
    assert not all_checkpoints(tmp_path / "out")


def test_training_goes_on_while_a_checkpoint_is_written_and_it_holds_the_step_it_is_of(
    run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(tmp_path / "whole", max_train_steps=4, save_steps=2)
    own_fill, own_call, steps, go_on = checkpoint._fill, Step.__call__, [], threading.Event()

    def slow_fill(stage: Path, snapshot: checkpoint.Snapshot) -> None:
        assert go_on.wait(60), "the step after the save was never begun"
        own_fill(stage, snapshot)

    def counted(self: Step, batch: Batch) -> torch.Tensor:
        steps.append(batch)
        if len(steps) == 4:  # two steps after the save began
            assert not all_checkpoints(tmp_path / "out")
            go_on.set()
        return own_call(self, batch)

    monkeypatch.setattr(checkpoint, "_fill", slow_fill)
    monkeypatch.setattr(Step, "__call__", counted)
    output = run(tmp_path / "out", max_train_steps=4, save_steps=2)
    for step in (2, 4):
        for name in (checkpoint.WEIGHTS, checkpoint.TENSORS):
            folder = f"checkpoint-{step}"
            assert (output / folder / name).read_bytes() == (whole / folder / name).read_bytes()


def test_two_runs_do_not_write_one_folder(tmp_path: Path) -> None:
    held = lock(tmp_path)
    with pytest.raises(Problem, match="another run"):
        lock(tmp_path)
    held.release()
    lock(tmp_path).release()


def test_nested_state_survives_flattening() -> None:
    tree = {"state": {0: {"exp_avg": torch.arange(3.0), "step": torch.tensor(2.0)}, 1: {"x": None}}, "lr": [1e-4, 2]}
    tensors, skeleton = flatten(tree, "t")
    back = unflatten(tensors, skeleton)
    assert back["state"][1] == {"x": None} and back["lr"] == [1e-4, 2]
    assert torch.equal(back["state"][0]["exp_avg"], tree["state"][0]["exp_avg"])
