"""Every experiment of the lab, by the name that `python -m faults NAME` takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from faults import files, folder, kills
from faults.lab import Finding, Lab

Experiment = Callable[[Lab], Iterator[Finding]]

EXPERIMENTS: dict[str, Experiment] = {
    "folder": folder.two_runs,
    "kills-saving": kills.during_saves,
    "kills-anywhere": kills.anywhere,
    "kills-prepare": files.preparing,
    "kills-export": files.exporting,
}
