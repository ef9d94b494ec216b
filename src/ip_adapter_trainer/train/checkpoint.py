"""Checkpoints: staged, hashed, renamed into place, rotated without ever losing the last good one.

A `checkpoint-N/` folder, N optimizer steps, holds::

    pytorch_model.bin          what to use: the adapter under its published training keys (the average, with EMA)
    adapter.json               what it is: variant, base model, encoder, steps
    training_state.safetensors optimizer moments; with EMA also the live weights
    training_state.json        step, resolved settings, length of the warm-up
    manifest.json              SHA-256 and size of each of these, written last
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ip_adapter_trainer.adapter_files import CARD, AdapterCard
from ip_adapter_trainer.adapter_files.raw import read_raw
from ip_adapter_trainer.core.errors import Problem, StorageProblem
from ip_adapter_trainer.core.log import say
from ip_adapter_trainer.storage.checkpoints import MANIFEST, all_checkpoints, complete, sha256_of, verified
from ip_adapter_trainer.storage.disk import reason_of, refusals
from ip_adapter_trainer.storage.documents import read_json
from ip_adapter_trainer.storage.staging import staged_folder
from ip_adapter_trainer.train.restored import demand_settings, demand_state
from ip_adapter_trainer.train.tree import flatten, unflatten

WEIGHTS, TENSORS, STATE = "pytorch_model.bin", "training_state.safetensors", "training_state.json"
FILES = (WEIGHTS, CARD, TENSORS, STATE)


@dataclass(frozen=True)
class Saved:
    """A checkpoint read back: the published weights, and nested training state as `state_dict`s."""

    step: int
    weights: dict[str, Tensor]
    state: dict[str, Any]


@dataclass(frozen=True)
class Snapshot:
    """A checkpoint in the host's memory, which later steps do not change."""

    step: int
    weights: dict[str, Tensor]
    card: AdapterCard
    tensors: dict[str, Tensor]  # of the training state, by path
    skeleton: Any  # the rest of it, JSON values


def take(step: int, weights: Mapping[str, Tensor], card: AdapterCard, state: Mapping[str, Any]) -> Snapshot:
    """Copy all that a checkpoint holds into the host's memory: weights [...], nested JSON values and tensors [...]."""
    tensors, skeleton = flatten(dict(state), "state")
    copied = {key: value.detach().to("cpu", copy=True).contiguous() for key, value in weights.items()}
    return Snapshot(step, copied, card, tensors, skeleton)


def write(output: Path, snapshot: Snapshot) -> Path:
    """Write `checkpoint-<step>` into the run's folder so that it exists whole or not at all.

    Raises:
        StorageProblem: not enough room, or the disk refused; earlier checkpoints are untouched.
    """
    final = output / f"checkpoint-{snapshot.step}"
    try:
        output.mkdir(parents=True, exist_ok=True)  # gone in the middle of a run, it is worth a new one
        _check_room(output, [*snapshot.weights.values(), *snapshot.tensors.values()])
        with staged_folder(final) as stage:
            _fill(stage, snapshot)
    except refusals() as error:
        what, remedy = f"the checkpoint was not saved: {reason_of(error)}", "make room; older checkpoints are untouched"
        raise StorageProblem(what, where=str(final), remedy=remedy) from error
    return final


def _fill(stage: Path, snapshot: Snapshot) -> None:
    torch.save(snapshot.weights, stage / WEIGHTS)
    save_file(snapshot.tensors, stage / TENSORS)
    (stage / CARD).write_text(snapshot.card.to_json(), encoding="utf-8")
    state = {"step": snapshot.step, "state": snapshot.skeleton}
    (stage / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
    files = sorted(f for f in stage.iterdir() if f.is_file())
    entries = {f.name: {"sha256": sha256_of(f), "bytes": f.stat().st_size} for f in files}
    (stage / MANIFEST).write_text(json.dumps(entries, indent=1), encoding="utf-8")


def _check_room(output: Path, tensors: list[Tensor]) -> None:
    need = int(1.05 * sum(t.numel() * t.element_size() for t in tensors)) + 1_000_000
    free = shutil.disk_usage(output).free
    if free < need:
        what = f"a checkpoint needs {need / 1e6:.0f} MB and the disk has {free / 1e6:.0f} MB"
        raise StorageProblem(what, where=str(output), remedy="make room, or lower --checkpoints_total_limit")


def prune(newest: Path, keep: int | None) -> None:
    """Remove checkpoints older than the `keep` newest whole ones, by renaming first, once the newest has verified.

    Of the others, beside it, only the sizes are looked at; with None all stay. Where the disk refuses, a line says so
    and the next save tries again.
    """
    folders = all_checkpoints(newest.parent)
    line = folders[: folders.index(newest) + 1] if newest in folders else []
    if keep is None or len(line) <= keep:
        return
    if not is_whole(newest):
        say(f"{newest} is not on the disk as it was written; no older checkpoint is removed")
        return
    whole = [*(folder for folder in line[:-1] if complete(folder, FILES)), newest]
    oldest_kept = whole[-keep] if len(whole) >= keep else line[0]
    for folder in line[: line.index(oldest_kept)]:
        doomed = folder.with_name(f".{folder.name}.removing")
        try:
            folder.rename(doomed)
        except OSError as error:
            say(f"{folder} was not removed: {reason_of(error)}")
        shutil.rmtree(doomed, ignore_errors=True)


def is_whole(folder: Path) -> bool:
    """Return whether a checkpoint's files are all there and are what was written; each is read."""
    return verified(folder, required=FILES)


def demand_whole(folder: Path) -> None:
    """Demand that a folder is a checkpoint of this trainer with the hashes that its manifest lists.

    Raises:
        Problem: no checkpoint there, or one that is damaged or was saved by the published script.
    """
    if not (folder / MANIFEST).exists():
        what = "this folder is no checkpoint that can be resumed"
        remedy = "give a checkpoint-N of this trainer; start from other weights with --pretrained_ip_adapter_path"
        raise Problem(what, where=str(folder), remedy=remedy)
    if not is_whole(folder):
        raise Problem("the checkpoint is damaged", where=str(folder), remedy="resume from an older one, or from latest")


def read_settings(folder: Path) -> tuple[int, dict[str, Any]]:
    """Read the step and what a checkpoint remembers of its run but tensors, before anything large is loaded.

    Raises:
        Problem: it is no run's.
    """
    step, state = _read_state(folder)
    demand_settings(step, state, folder / STATE)
    return step, state


def _read_state(folder: Path) -> tuple[Any, Any]:
    """Step and state as they lie in the file."""
    try:
        saved = read_json(folder / STATE)
        return saved["step"], saved["state"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise _unreadable(folder, error) from error


def _unreadable(folder: Path, error: Exception) -> Problem:
    what = f"the checkpoint's state cannot be read: {type(error).__name__}: {error}"
    return Problem(what, where=str(folder / STATE), remedy="resume from another checkpoint")


def read(folder: Path) -> Saved:
    """Read a checkpoint for resuming, hashes verified, no pickle executed.

    Raises:
        Problem: no checkpoint there, or one that is damaged, forged or was saved by the published script.
    """
    demand_whole(folder)
    AdapterCard.read(folder / CARD)  # who is handed this folder reads it
    weights, tensors = read_raw(folder / WEIGHTS).tensors, read_raw(folder / TENSORS).tensors
    step, skeleton = _read_state(folder)
    try:
        state = unflatten(tensors, skeleton)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise _unreadable(folder, error) from error
    demand_state(step, state, folder / STATE)
    return Saved(step, weights, state)
