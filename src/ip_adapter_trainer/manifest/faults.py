"""Counts faulty rows, writes each down once, and stops the run when they are too many."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from ip_adapter_trainer.core.errors import DataProblem, Fault, Problem
from ip_adapter_trainer.storage.documents import json_of
from ip_adapter_trainer.storage.files import NotRegularError, open_regular
from ip_adapter_trainer.storage.lines import Lines

FILE_NAME = "faults.jsonl"
_MAX_ROW_BYTES = 2**14  # of the file, for each row; a fault takes about 300
_REMOVE = "remove it; faults are met again"


def allowed_rows(rows: int, max_fault_rate: float) -> int:
    """Return how many rows may be faulty: the rate of them and at least one, but never all; none if the rate is 0."""
    return min(rows - 1, max(1, int(rows * max_fault_rate + 1e-9))) if max_fault_rate else 0


def excess(faulty: int, rows: int, max_fault_rate: float) -> str:
    """Return what is said of so many faulty rows if nothing may be done with the others; nothing if it may."""
    if faulty <= allowed_rows(rows, max_fault_rate):
        return ""
    why = f"over the limit of {max_fault_rate:.2%}" if faulty < rows else "none is left"
    return f"{faulty} of {rows} rows are faulty, {why}"


def demand_usable(faults: Sequence[Fault], rows: int, max_fault_rate: float) -> None:
    """Demand that these faults leave as many of the rows usable as `max_fault_rate` asks for.

    Raises:
        DataProblem: they are not.
    """
    faulty = len({fault.where for fault in faults})
    if what := excess(faulty, rows, max_fault_rate):
        kinds = Counter(fault.kind for fault in faults)
        raise _problem(what, kinds, faults[0], "`ip-adapter check` names", is_left=faulty < rows)


def _problem(what: str, kinds: Counter[str], example: Fault, named_by: str, *, is_left: bool) -> DataProblem:
    told = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    remedy = f"mend the rows that {named_by}" + (", or raise --max_fault_rate" if is_left else "")
    return DataProblem(f"{what} ({told})", where=str(example), remedy=remedy)


class FaultLog:
    """The faults of a run, in `faults.jsonl` of its folder; a resumed run goes on where the file ends.

    Processes that share the folder share the file: each hears of what the others wrote before it adds to it.

    Raises:
        Problem: what stands in the file's place is no file, or too large to be of these rows.
    """

    def __init__(self, folder: Path, rows: int, max_fault_rate: float) -> None:
        self.rows, self.max_fault_rate = rows, max_fault_rate
        self._path = folder / FILE_NAME
        self._lines = Lines(self._path)
        self._seen: dict[Fault, None] = {}
        self._places: set[str] = set()
        self._heard_bytes = 0  # of the file
        self._hear()

    @property
    def faulty_rows(self) -> int:
        """Distinct rows with a fault."""
        return len(self._places)

    @property
    def by_kind(self) -> Counter[str]:
        """Distinct faults of each kind."""
        return Counter(fault.kind for fault in self._seen)

    def add(self, faults: Iterable[Fault], *, writes: bool = True) -> None:
        """Note faults; those already noted change nothing, and what the disk refused earlier is tried again.

        Without `writes`, another process writes them down, which knows the same ones.

        Raises:
            DataProblem: more rows are faulty than `max_fault_rate` allows.
            Problem: see `FaultLog`.
        """
        fresh = [fault for fault in dict.fromkeys(faults) if fault not in self._seen]
        if fresh:
            self._hear()
        unheard = [fault for fault in fresh if fault not in self._seen]
        self._note(unheard)
        self._lines.add("".join(json.dumps(asdict(fault)) + "\n" for fault in unheard if writes))
        if fresh:
            self.demand_limit()

    def _note(self, faults: Iterable[Fault]) -> None:
        for fault in faults:
            self._seen[fault] = None
            self._places.add(fault.where)

    def _hear(self) -> None:
        """Notes what was written since the last time, by whichever process."""
        try:
            with open_regular(self._path) as file:
                size_bytes = os.fstat(file.fileno()).st_size
                if size_bytes > _MAX_ROW_BYTES * max(self.rows, 1):
                    what = f"{size_bytes:,} bytes are more than the faults of {self.rows} rows can take"
                    raise Problem(what, where=str(self._path), remedy=_REMOVE)
                file.seek(self._heard_bytes)
                content = file.read()
        except NotRegularError as error:
            raise Problem("no regular file", where=str(self._path), remedy=_REMOVE) from error
        except OSError:  # not there yet
            return
        whole_bytes = content.rfind(b"\n") + 1
        self._heard_bytes += whole_bytes
        self._note(filter(None, map(_fault_of, content[:whole_bytes].splitlines())))

    def demand_limit(self) -> None:
        """Demand that the faults noted so far, by whichever process, are not too many.

        Raises:
            DataProblem: more rows are faulty than `max_fault_rate` allows.
        """
        if what := excess(self.faulty_rows, self.rows, self.max_fault_rate):
            last = next(reversed(self._seen))
            is_left = self.faulty_rows < self.rows
            raise _problem(what, self.by_kind, last, f"{self._path} names", is_left=is_left)


def _fault_of(line: bytes) -> Fault | None:
    """The fault of a line; None: torn by a kill while it was written, or damaged; its row will be met again."""
    try:
        table = json_of(line.decode())
        return Fault(**table) if all(isinstance(value, str) for value in table.values()) else None
    except (ValueError, TypeError, AttributeError):
        return None
