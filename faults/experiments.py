"""Every experiment of the lab, by the name that `python -m faults NAME` takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from faults import folder, strangers, written
from faults.lab import Finding, Lab

Experiment = Callable[[Lab], Iterator[Finding]]

EXPERIMENTS: dict[str, Experiment] = {
    "folder": folder.two_runs,
    "pickles": strangers.pickled,
    "forged": strangers.forged,
    "configs": strangers.configs,
    "flips": written.flips,
    "own_pickles": written.own_pickles,
    "markup": written.markup,
    "secrets": written.secrets,
}
