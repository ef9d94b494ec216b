"""Stop signals in every phase of a run: what was trained or encoded is saved, and the run is gone in ten seconds."""

from __future__ import annotations

import os
import re
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from faults.files import Rows, rows_of
from faults.lab import Finding, Lab, Process
from ip_adapter_trainer.cache.index import IMAGES
from ip_adapter_trainer.pocket import write
from ip_adapter_trainer.storage.checkpoints import newest, verified

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
LIMIT_S = 10.0
_MANY_ROWS = 400  # for phases that have to last
_ENDLESS = 100_000
_MICRO_BATCHES = 200  # of a step that takes longer than a stop may
_LAUNCHERS = 1  # exit code, whatever became of what it launched
_FIRST_FAILURE = re.compile(r"failed \(exitcode: (-?\d+)\)")  # of a launched process, as its launcher tells it
_OTHER_CAUSES = ("error: ", "bug: ", " before stopping")  # what is said where no signal ends a run

Settings = dict[str, Any]
Missing = Callable[[Path], Iterator[str]]
Targets = Callable[[Process], list[int]]


@dataclass(frozen=True)
class Phase:
    """One phase of a command's life.

    Attributes:
        name: in words.
        command: that is stopped.
        settings: under which the phase is met, and lasts.
        begun: whether it is there, by the output folder and what was said.
        delay_s: from then on to the signal.
        keeps: what is there afterwards, in words.
        missing: what of it is not, in the output folder; None: there is nothing to keep, and a signal may find the
            process before it watches for any.
    """

    name: str
    command: str
    settings: Settings
    begun: Callable[[Path, Process], object]
    delay_s: float
    keeps: str
    missing: Missing | None

    def codes(self, number: signal.Signals) -> set[int]:
        """Exit codes that are right after a signal."""
        return {128 + number} if self.missing else {128 + number, -number}


@dataclass(frozen=True)
class _Preparing:
    """The filling of a set, done once without a stop and compared with those that are stopped."""

    lab: Lab
    settings: Settings

    @cached_property
    def whole(self) -> Rows:
        """The rows of the set that was not stopped."""
        folder = self.lab.place("whole")
        self._fill(folder)
        return rows_of(folder)

    def missing(self, folder: Path) -> Iterator[str]:
        """What is wrong with a set that was stopped, and with how the same command goes on with it."""
        left = rows_of(folder)
        rest = _encodings(self.whole) - _encodings(left)
        if not (0 < rest < _encodings(self.whole) and left.items() <= self.whole.items()):
            yield f"{_encodings(left)} of {_encodings(self.whole)} encodings are kept"
        said = self._fill(folder)
        if f" and {rest} encodings made now" not in said or rows_of(folder) != self.whole:
            yield f"{rest} encodings were left to make: {said}"

    def _fill(self, folder: Path) -> str:
        code, said = self.lab.run("prepare", {**self.settings, "prepared_dir": folder})
        assert code == 0, said
        return said


def _encodings(rows: Rows) -> int:
    return sum(table != IMAGES.folder for table, _ in rows)


def _lines(output: Path) -> int:
    file = output / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def _says(words: str, output: Path, process: Process) -> bool:
    return words in process.said


def _many(lab: Lab) -> Settings:
    """Inputs with rows enough to be stopped in the middle of encoding them."""
    folder = lab.folder / "many"
    if not folder.exists():
        write.write_pocket(folder, rows=_MANY_ROWS)
    return {"data_json_file": folder / "data.json", "data_root_path": folder / "images"}


def phases(lab: Lab) -> list[Phase]:
    """All of them."""
    endless: Settings = {"max_train_steps": _ENDLESS, "save_steps": _ENDLESS}
    losses = {**endless, "validation_steps": 2, "num_validation_images": 24}
    long = {**endless, "gradient_accumulation_steps": _MICRO_BATCHES}
    grids = {**endless, "validation_steps": 2, "num_validation_images": 2, "grid_rows": 8, "grid_steps": 400}
    first = {**endless, **_many(lab), "prepare": "auto", "encode_batch_size": 1}
    preparing = _Preparing(lab, {**lab.inputs, **_many(lab), "encode_batch_size": 1})
    step = ("the step at which it stopped is saved", _unsaved)
    kept = "what was encoded is kept, a second run encodes the rest alone"
    encodes = partial(_says, "pictures to read")
    return [
        Phase("loading", "train", endless, lambda o, p: True, 3.0, "nothing to save yet", None),
        Phase("steps", "train", endless, lambda o, p: _lines(o) >= 3, 0.1, *step),
        Phase("a long step", "train", long, lambda o, p: _lines(o) >= 1, 0.5, "the step before it is saved", _unsaved),
        Phase("saving", "train", {**endless, "save_steps": 1}, lambda o, p: any(o.glob(".checkpoint-*")), 0.0, *step),
        Phase("validation", "train", losses, lambda o, p: _lines(o) >= 2, 0.2, *step),
        Phase("grids", "train", grids, partial(_says, "with shuffled images"), 0.3, *step),
        Phase("preparing first", "train", first, encodes, 1.0, kept, lambda o: preparing.missing(o / "prepared")),
        Phase("prepare", "prepare", preparing.settings, encodes, 1.0, kept, preparing.missing),
    ]


@dataclass
class Tally:
    """What became of the runs that were stopped."""

    tries: int = 0
    longest_s: float = 0.0
    codes: Counter[int] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def finding(self, fault: str, done: str) -> Finding:
        """The finding."""
        codes = ", ".join(f"{code} {count} times" for code, count in sorted(self.codes.items()))
        note = f"{done}; {self.longest_s:.1f} s at the longest (limit {LIMIT_S:.0f}); exit {codes}; "
        note += f"faults: {len(self.faults)}"
        note += f"; the first: {self.faults[0]}" if self.faults else ""
        return Finding(fault, self.tries, len(self.faults), not self.faults, note)


def _stop(lab: Lab, phase: Phase, number: signal.Signals, tally: Tally, processes: int, targets: Targets) -> None:
    """Starts a run, stops it in a phase, and notes what was wrong."""
    output = lab.place("signals") / "out"
    where = {"prepared_dir": output} if phase.command == "prepare" else lab.training(output)
    process = lab.start(phase.command, {**where, **phase.settings}, processes=processes)
    if processes > 1:
        process.wait_until(lambda: len(process.children()) == processes)
    process.wait_until(lambda: phase.begun(output, process))
    time.sleep(phase.delay_s)
    began, tally.tries = time.monotonic(), tally.tries + 1
    for pid in targets(process):
        with suppress(ProcessLookupError):
            os.kill(pid, number)
    process.wait()
    while process.members():
        time.sleep(0.05)
    took_s, code = time.monotonic() - began, _code(process)
    tally.longest_s, tally.codes[code] = max(tally.longest_s, took_s), tally.codes[code] + 1
    wrong = [f"{took_s:.1f} s"] if took_s > LIMIT_S else []
    wrong += [f"exit {code}"] if code not in phase.codes(number) | ({_LAUNCHERS} if processes > 1 else set()) else []
    wrong += [f"it said {words!r}" for words in _OTHER_CAUSES if words in process.said]
    wrong += phase.missing(output) if phase.missing else []
    if wrong:
        tally.faults.append(f"{phase.name}, {number.name}: {', '.join(wrong)}; {' '.join(process.said.split())[-150:]}")


def _code(process: Process) -> int:
    """Exit code of the launched process that ended first, where its launcher tells it; else the command's own."""
    told = _FIRST_FAILURE.search(process.said)
    return int(told[1]) if told else process.wait()


def _unsaved(output: Path) -> Iterator[str]:
    """What is missing of the very step at which a run stopped."""
    last = newest(output, verified)
    steps = [line for line in (output / "metrics.jsonl").read_text().splitlines() if '"lr"' in line]
    if last is None or last.name != f"checkpoint-{len(steps)}":
        yield f"{len(steps)} steps, saved {last and last.name}"


def _itself(process: Process) -> list[int]:
    return [process.pid]


def each_phase(lab: Lab) -> Iterator[Finding]:
    """Every signal in every phase, one process."""
    for phase in phases(lab):
        tally = Tally()
        for number in SIGNALS:
            for _ in range(lab.tries(2)):
                _stop(lab, phase, number, tally, 1, _itself)
        yield tally.finding(f"SIGTERM, SIGINT, SIGUSR1 while {phase.name}", phase.keeps)


def launched(lab: Lab) -> Iterator[Finding]:
    """Two processes under `accelerate launch`: a signal to the launcher, to all at once as a terminal sends it, or to
    the two alone, whose exit code the launcher then tells.
    """
    ways = (
        (signal.SIGTERM, _itself),
        (signal.SIGTERM, Process.members),
        (signal.SIGINT, Process.members),
        (signal.SIGUSR1, Process.children),
    )
    tally = Tally()
    for phase in phases(lab):
        for number, targets in ways:
            _stop(lab, phase, number, tally, 2, targets)
    done = "in every phase; every step, and what was encoded, is kept; no other cause is told"
    yield tally.finding("SIGTERM, SIGINT, SIGUSR1, two processes", done)
