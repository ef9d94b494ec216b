"""The start of a run, at its first step or at a checkpoint: chosen once, before anything large is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ip_adapter_trainer.core.errors import Problem
from ip_adapter_trainer.core.log import say
from ip_adapter_trainer.storage.checkpoints import newest, numbered_checkpoints, step_of
from ip_adapter_trainer.train import checkpoint
from ip_adapter_trainer.train.aside import lies_in
from ip_adapter_trainer.train.config import CheckpointConfig

LATEST = "latest"


@dataclass(frozen=True)
class StartingPoint:
    """The checkpoint that a run goes on from, if there is one.

    Attributes:
        folder: of the checkpoint; None: the run begins at its first step.
        step: of the checkpoint.
        state: what the checkpoint remembers, tensors left out.
        is_own: whether it lies in the run's own folder.
        standing: steps of all checkpoints that lay there when this one was chosen, ascending.
    """

    folder: Path | None = None
    step: int = 0
    state: Mapping[str, Any] | None = None
    is_own: bool = False
    standing: tuple[int, ...] = ()

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
    """The checkpoint of a path; a bare name may be one in the run's folder, as diffusers' scripts take it.

    Raises:
        Problem: there is none, or a damaged one.
    """
    folder = Path(asked)
    if not _is_there(folder) and len(folder.parts) == 1:
        folder = output / folder
    if not _is_there(folder):
        near = " or ".join(map(str, _nearest(folder, output)))
        remedy = f"give {near}" if near else f"give the path of a checkpoint-N folder, or {LATEST} to begin afresh"
        raise Problem("there is no such checkpoint", where=f"--resume_from_checkpoint {asked}", remedy=remedy)
    checkpoint.demand_whole(folder)
    return folder


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that no file can have, or a folder that cannot be entered
        return False


def _nearest(asked: Path, output: Path) -> list[Path]:
    """The whole checkpoints of a run's folder next to a step that is not there, before and after; else the newest."""
    at, there = step_of(asked), numbered_checkpoints(output)
    before = [folder for step, folder in there if at is None or step < at]
    after = [folder for _, folder in there[len(before) :]]
    return [folder for side in (reversed(before), after) for folder in islice(filter(checkpoint.is_whole, side), 1)]
