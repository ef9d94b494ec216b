"""Every experiment of the lab, by the name that `python -m faults NAME` takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from faults import (
    changes,
    disk,
    files,
    folder,
    gone,
    insist,
    kills,
    numbers,
    paths,
    pictures,
    rows,
    signals,
    strangers,
    workers,
    worlds,
    writes,
    written,
)
from faults.lab import Finding, Lab

Experiment = Callable[[Lab], Iterator[Finding]]

EXPERIMENTS: dict[str, Experiment] = {
    "folder": folder.two_runs,
    "kills-saving": kills.during_saves,
    "kills-anywhere": kills.anywhere,
    "kills-prepare": files.preparing,
    "kills-export": files.exporting,
    "signals": signals.each_phase,
    "signals-launched": signals.launched,
    "insist": insist.insisting,
    "gone": gone.gone_folders,
    "disk": disk.full_disks,
    "writes": writes.refused_writes,
    "worlds": worlds.same_draws,
    "workers": workers.lost_workers,
    "workers-prepare": workers.lost_workers_of_prepare,
    "changes": changes.other_run,
    "million": changes.one_in_a_million,
    "numbers": numbers.not_finite,
    "pictures": pictures.pictures,
    "bombs": pictures.bombs,
    "flips": pictures.flips,
    "replaced": pictures.replaced,
    "rows": rows.rows,
    "endless": rows.endless,
    "names": rows.names,
    "paths": paths.paths,
    "pickles": strangers.pickled,
    "forged": strangers.forged,
    "configs": strangers.configs,
    "fault-lists": strangers.fault_lists,
    "flips-checkpoint": written.flips,
    "own-pickles": written.own_pickles,
    "markup": written.markup,
    "secrets": written.secrets,
}
