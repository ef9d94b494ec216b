"""A run's folder holds one line of checkpoints: what is in the way of a run that goes back is set aside, never lost.

A run that goes on from an older checkpoint, or from another folder's, would mix its checkpoints with those that stand
in its folder: the highest step would be taken for the newest, and new ones removed as the older. So those that do not
lead to where it goes on move into a folder of their own, `set-aside-1` and so on, which holds::

    checkpoint-N/   as they were
    metrics.jsonl   a copy, as it was
    grids/          of their steps
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path

from ip_adapter_trainer.core.errors import StorageProblem
from ip_adapter_trainer.core.log import say
from ip_adapter_trainer.storage.checkpoints import numbered_checkpoints
from ip_adapter_trainer.storage.disk import reason_of
from ip_adapter_trainer.storage.staging import staged_folder
from ip_adapter_trainer.train.metrics import METRICS

_GRIDS, _GRID = "grids", re.compile(r"step-(\d+)\.png")  # as `train.validate` names them


def lies_in(checkpoint: Path, output: Path) -> bool:
    """Return whether a checkpoint lies in a run's own folder, whatever links lead to either."""
    return output.resolve() in (checkpoint.parent.resolve(), checkpoint.resolve().parent)


def set_aside(output: Path, parent: Path | None, step: int) -> None:
    """Move those checkpoints of a run's folder aside that do not lead to where the run goes on, and say so.

    Whenever it is broken off, each of them is whole in one of the two places, and the folder's newest one stays so
    until the others have moved. Without a `parent` the run begins afresh.

    Raises:
        StorageProblem: the disk refuses.
    """
    is_own = parent is not None and lies_in(parent, output)
    last = step if is_own else -1
    folders = [folder for number, folder in numbered_checkpoints(output) if number > last]
    if not folders:
        return
    try:
        aside = _new_folder(output)
        named = [(file, _GRID.fullmatch(file.name)) for file in sorted(output.glob(f"{_GRIDS}/*.png"))]
        _move([file for file, match in named if match and int(match.group(1)) > last], aside / _GRIDS)
        _move(folders, aside)
    except OSError as error:
        what, remedy = f"cannot set checkpoints aside: {reason_of(error)}", "make room, or give another --output_dir"
        raise StorageProblem(what, where=str(output), remedy=remedy) from error
    why = "not whole, and this run begins afresh" if parent is None else f"not of the line of {parent}"
    why = f"newer than {parent.name}" if parent and is_own else why
    whence = ", from which this run goes on" if parent else ""
    how = "what is whole can be exported or resumed by its path there"
    first, last_name, count_of = folders[0].name, folders[-1].name, len(folders)
    several = f"{first} and {last_name} are" if count_of == 2 else f"{first} to {last_name} ({count_of}) are"
    say(f"{f'{first} is' if count_of == 1 else several} {why}{whence}: kept in {aside}; {how}")


def _new_folder(output: Path) -> Path:
    """A folder of the next free name, with a copy of the run's metrics in it."""
    folders = (output / f"set-aside-{number}" for number in count(1))
    free = next(folder for folder in folders if not folder.exists())
    with staged_folder(free) as stage, suppress(FileNotFoundError):
        shutil.copyfile(output / METRICS, stage / METRICS)
    return free


def _move(paths: Sequence[Path], folder: Path) -> None:
    if paths:
        folder.mkdir(exist_ok=True)
    for path in paths:
        path.rename(folder / path.name)
