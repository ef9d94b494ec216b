"""Every experiment of the lab, by the name that `python -m faults NAME` takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from faults import folder, gone, insist, writes
from faults.lab import Finding, Lab

Experiment = Callable[[Lab], Iterator[Finding]]

EXPERIMENTS: dict[str, Experiment] = {
    "folder": folder.two_runs,
    "gone": gone.gone_folders,
    "insist": insist.insisting,
    "writes": writes.refused_writes,
}
