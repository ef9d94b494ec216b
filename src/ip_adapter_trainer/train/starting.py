"""The start of a run, at its first step or at a checkpoint: chosen once, before anything large is loaded."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from ip_adapter_trainer.core.errors import Problem
from ip_adapter_trainer.core.log import say
from ip_adapter_trainer.manifest.manifest import Manifest
from ip_adapter_trainer.runtime.launch import Runtime
from ip_adapter_trainer.runtime.launcher import launched_precision
from ip_adapter_trainer.runtime.precision import on_device
from ip_adapter_trainer.storage.checkpoints import complete, newest, numbered_checkpoints, step_of
from ip_adapter_trainer.train import checkpoint, guard
from ip_adapter_trainer.train.aside import lies_in
from ip_adapter_trainer.train.config import CheckpointConfig, TrainConfig
from ip_adapter_trainer.train.rows import RunRows
from ip_adapter_trainer.train.run_plan import total_steps

LATEST = "latest"


@dataclass(frozen=True)
class StartingPoint:
    """The checkpoint that a run goes on from, if there is one."""

    folder: Path | None = None  # of the checkpoint; None: the run begins at its first step
    step: int = 0
    state: Mapping[str, Any] | None = None  # what the checkpoint remembers, tensors left out
    is_own: bool = False  # whether it lies in the run's own folder
    standing: tuple[int, ...] = ()  # steps of all checkpoints that lay there when this one was chosen, ascending

    @property
    def lacks_validation(self) -> bool:
        """True if this is its run's newest checkpoint, and was saved before its step was validated."""
        is_newest = self.is_own and max(self.standing, default=0) <= self.step
        return is_newest and self.state is not None and self.state.get("validated") != self.step

    def demand_unchanged(self, output: Path) -> None:
        """Demand that no other run has saved into the run's folder before this one claimed it.

        Raises:
            Problem: it holds other checkpoints than when this one was chosen.
        """
        if _steps(output) != self.standing:
            what = "another run has written checkpoints here since this one was started"
            remedy = f"start again: with --resume_from_checkpoint {LATEST} to go on from them, or another --output_dir"
            raise Problem(what, where=str(output), remedy=remedy)


def starting_point(config: CheckpointConfig) -> StartingPoint:
    """Return where a run begins, by its settings and by what lies in its folder; a checkpoint's hashes are verified.

    Raises:
        Problem: no such checkpoint, or a damaged one; or the folder holds a run that is not to be resumed.
    """
    asked, output = config.resume_from_checkpoint, Path(config.output_dir)
    standing = _steps(output)
    if asked is None:
        if standing:
            remedy = f"give --resume_from_checkpoint {LATEST} to go on, or another --output_dir"
            raise Problem("the output folder holds another run's checkpoints", where=config.output_dir, remedy=remedy)
        return StartingPoint()
    folder = newest(output, checkpoint.is_whole) if asked == LATEST else _named(asked, output)
    if folder is None:
        say("nothing to resume: starting afresh")
        return StartingPoint(standing=standing)
    step, state = checkpoint.read_settings(folder)
    return StartingPoint(folder, step, state, lies_in(folder, output), standing)


def _steps(output: Path) -> tuple[int, ...]:
    return tuple(step for step, _ in numbered_checkpoints(output))


def _named(asked: str, output: Path) -> Path:
    """The checkpoint of a path; a bare name may be one in the run's folder, as diffusers' scripts take it."""
    folder = Path(asked)
    if not _is_there(folder) and len(folder.parts) == 1:
        folder = output / folder
    if not _is_there(folder):
        at, there = step_of(folder), numbered_checkpoints(output)
        before = [path for step, path in there if at is None or step < at]
        sides = reversed(before), [path for _, path in there[len(before) :]]
        near = " or ".join(str(path) for side in sides for path in islice(filter(checkpoint.is_whole, side), 1))
        remedy = f"give {near}" if near else f"give the path of a checkpoint-N folder, or {LATEST} to begin afresh"
        raise Problem("there is no such checkpoint", where=f"--resume_from_checkpoint {asked}", remedy=remedy)
    checkpoint.demand_whole(folder)
    return folder


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that no file can have, or a folder that cannot be entered
        return False


def agreed_starting_point(config: CheckpointConfig, runtime: Runtime) -> StartingPoint:
    """Return `starting_point` as the first process sees it, so that all begin at the same step.

    Raises:
        Problem: see `starting_point`; or a machine does not have the checkpoint.
    """
    point = StartingPoint()
    with runtime.agreed():
        if runtime.is_main:
            point = starting_point(config)
    point = runtime.shared(point)
    with runtime.agreed():
        if point.folder and not complete(point.folder):
            what = "the checkpoint lies on the first machine, and this one does not have it"
            where = f"{point.folder.absolute()} on {platform.node()}"
            disk = "put --output_dir on a disk that all machines share"
            raise Problem(what, where=where, remedy=f"{disk}, or copy the checkpoint to the same path on each")
    return point


def as_begun(config: TrainConfig, runtime: Runtime, point: StartingPoint) -> tuple[TrainConfig, Runtime]:
    """Return the settings and the runtime with precision and optimizer as asked for, else as the run so far has them.

    Versions that knew neither bf16's own precision nor Muon began in fp32 and with AdamW.
    """
    optimizer: str = "muon"
    if point.state is not None:
        began = point.state["config"]
        optimizer = began.get("optimizer") or guard.BEFORE["optimizer"]
        if not (config.mixed_precision or launched_precision()):
            own = on_device(began.get("mixed_precision") or "no", runtime.device.type)
            runtime = replace(runtime, precision=own)
    found = {"mixed_precision": runtime.precision, "optimizer": config.optimizer or optimizer}
    return config.model_copy(update=found), runtime


def demand_same_run(config: TrainConfig, runtime: Runtime, manifest: Manifest, point: StartingPoint) -> None:
    """Refuse to resume what these settings and rows do not belong to, before any model is loaded.

    `RunRecord.restore` looks again, and at the models.

    Raises:
        Problem: settings, rows or images per step differ.
    """
    images = config.images_per_step(runtime.world)
    identity = guard.RunIdentity(manifest.fingerprint, manifest.where, {}, images, runtime.world)
    if point.state is not None:
        guard.check(point.state, config, identity, tell=lambda line: None)


def is_over(config: TrainConfig, runtime: Runtime, rows: RunRows, point: StartingPoint) -> bool:
    """Return whether a resumed run has nothing left to do; that it has nothing left to train is told."""
    total = total_steps(config, rows.trained, config.images_per_step(runtime.world))
    if not point.folder or point.step < total:
        return False
    way = f"give --max_train_steps above {point.step} to go on"
    say(f"nothing left to train: {point.folder} is at step {point.step}, and the run has {total} steps; {way}")
    return not (point.lacks_validation and config.validates) and not config.dry_run
