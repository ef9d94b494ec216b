"""Counts faulty rows, writes each down once, and stops the run when they are too many."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from ip_adapter_trainer.core.errors import DataProblem
from ip_adapter_trainer.core.lines import Lines
from ip_adapter_trainer.core.types import Fault

FILE_NAME = "faults.jsonl"


def allowed_rows(rows: int, max_fault_rate: float) -> int:
    """How many rows may be faulty: the rate of them and at least one; none if the rate is 0."""
    return max(1, int(rows * max_fault_rate + 1e-9)) if max_fault_rate else 0


class FaultLog:
    """The faults of a run, in `faults.jsonl` of its folder; a resumed run goes on where the file ends.

    Usage::

        log = FaultLog(output_dir, manifest.entries, config.max_fault_rate)
        log.add(manifest.faults)
        log.add(batch.faults)
    """

    def __init__(self, folder: Path, rows: int, max_fault_rate: float) -> None:
        self.rows, self.max_fault_rate = rows, max_fault_rate
        self._path = folder / FILE_NAME
        self._lines = Lines(self._path)
        self._seen = dict.fromkeys(_read(self._path))
        self._places = {fault.where for fault in self._seen}

    @property
    def faulty_rows(self) -> int:
        """Distinct rows with a fault."""
        return len(self._places)

    @property
    def by_kind(self) -> Counter[str]:
        """Distinct faults of each kind."""
        return Counter(fault.kind for fault in self._seen)

    def add(self, faults: Iterable[Fault]) -> None:
        """Notes faults; those already noted change nothing, and what the disk refused earlier is tried again.

        Raises:
            DataProblem: more rows are faulty than `max_fault_rate` allows.
        """
        fresh = [fault for fault in dict.fromkeys(faults) if fault not in self._seen]
        self._seen |= dict.fromkeys(fresh)
        self._places |= {fault.where for fault in fresh}
        self._lines.add("".join(json.dumps(asdict(fault)) + "\n" for fault in fresh))
        if fresh:
            self.demand_limit()

    def demand_limit(self) -> None:
        """Demands that the faults noted so far, by whichever process, are not too many.

        Raises:
            DataProblem: more rows are faulty than `max_fault_rate` allows.
        """
        if self.faulty_rows > allowed_rows(self.rows, self.max_fault_rate):
            raise self._problem(next(reversed(self._seen)))

    def _problem(self, last: Fault) -> DataProblem:
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.by_kind.most_common())
        share = f"over the limit of {self.max_fault_rate:.2%}"
        what = f"{self.faulty_rows} of {self.rows} rows are faulty, {share} ({kinds})"
        remedy = f"mend the rows that {self._path} names, or raise --max_fault_rate"
        return DataProblem(what, where=str(last), remedy=remedy)


def _read(path: Path) -> list[Fault]:
    if not path.exists():
        return []
    faults = []
    for line in path.read_text().splitlines():
        try:
            faults.append(Fault(**json.loads(line)))
        except (ValueError, TypeError):  # torn by a kill while it was written; its row will be met again
            continue
    return faults
