"""Stop signals in every phase of a run: what was trained is saved, and the run is gone in ten seconds."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from faults.lab import Finding, Lab, Process
from ip_adapter_trainer.core.checkpoints import newest, verified
from ip_adapter_trainer.pocket import lay

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
LIMIT_S = 10.0
_MANY_ROWS = 800  # for phases that have to last
_ENDLESS = 100_000

Settings = dict[str, Any]


@dataclass(frozen=True)
class Phase:
    """One phase of a command's life.

    Attributes:
        name: in words.
        command: that is stopped.
        settings: under which the phase is met, and lasts.
        begun: whether it is there, by the output folder and what was said.
        delay_s: from then on to the signal.
        saves: whether training has begun, so that there is something to save.
    """

    name: str
    command: str
    settings: Settings
    begun: Callable[[Path, Process], object]
    delay_s: float
    saves: bool = True


def _lines(output: Path) -> int:
    file = output / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def _says(words: str, output: Path, process: Process) -> bool:
    return words in process.said


def _many(lab: Lab) -> Settings:
    """Inputs with rows enough to be stopped in the middle of encoding them."""
    folder = lab.folder / "many"
    if not folder.exists():
        lay.lay(folder, rows=_MANY_ROWS)
    return {"data_json_file": folder / "data.json", "data_root_path": folder / "images"}


def phases(lab: Lab) -> list[Phase]:
    """All of them."""
    endless: Settings = {"max_train_steps": _ENDLESS, "save_steps": _ENDLESS}
    losses = {**endless, "validation_steps": 2, "num_validation_images": 24}
    grids = {**endless, "validation_steps": 2, "num_validation_images": 2, "grid_rows": 8, "grid_steps": 400}
    first = {**endless, **_many(lab), "prepare": "auto", "encode_batch_size": 1}
    preparing = {**lab.inputs, **_many(lab), "encode_batch_size": 1}
    return [
        Phase("loading", "train", endless, lambda o, p: True, 3.0, saves=False),
        Phase("steps", "train", endless, lambda o, p: _lines(o) >= 3, 0.1),
        Phase("saving", "train", {**endless, "save_steps": 1}, lambda o, p: any(o.glob(".checkpoint-*")), 0.0),
        Phase("validation", "train", losses, lambda o, p: _lines(o) >= 2, 0.2),
        Phase("grids", "train", grids, partial(_says, "validation loss"), 0.3),
        Phase("preparing first", "train", first, partial(_says, "pictures to read"), 1.0, saves=False),
        Phase("prepare", "prepare", preparing, partial(_says, "pictures to read"), 1.0, saves=False),
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


def _stop(lab: Lab, phase: Phase, number: signal.Signals, tally: Tally, processes: int, group: bool) -> None:
    """Starts a run, stops it in a phase, and notes what was wrong."""
    output = lab.place("signals") / "out"
    where = {"prepared_dir": output} if phase.command == "prepare" else lab.training(output)
    process = lab.start(phase.command, {**where, **phase.settings}, processes=processes)
    process.wait_until(lambda: phase.begun(output, process))
    time.sleep(phase.delay_s)
    began, tally.tries = time.monotonic(), tally.tries + 1
    for pid in process.members() if group else [process.pid]:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
    code = process.wait()
    while process.members():
        time.sleep(0.05)
    took_s = time.monotonic() - began
    tally.longest_s, tally.codes[code] = max(tally.longest_s, took_s), tally.codes[code] + 1
    wrong = [f"{took_s:.1f} s"] if took_s > LIMIT_S else []
    if processes == 1 and code not in (128 + number, *([-number] if not phase.saves else [])):
        wrong.append(f"exit {code}")
    wrong += [*_unsaved(output)] if phase.saves else []
    if wrong:
        tally.faults.append(f"{phase.name}, {number.name}: {', '.join(wrong)}; {' '.join(process.said.split())[-150:]}")


def _unsaved(output: Path) -> Iterator[str]:
    """What is missing of the very step at which a run stopped."""
    last = newest(output, verified)
    steps = [line for line in (output / "metrics.jsonl").read_text().splitlines() if '"lr"' in line]
    if last is None or last.name != f"checkpoint-{len(steps)}":
        yield f"{len(steps)} steps, saved {last and last.name}"


def each_phase(lab: Lab) -> Iterator[Finding]:
    """Every signal in every phase, one process."""
    for phase in phases(lab):
        tally = Tally()
        for number in SIGNALS:
            for _ in range(lab.tries(2)):
                _stop(lab, phase, number, tally, 1, group=False)
        what = "the step at which it stopped is saved" if phase.saves else "nothing to save yet"
        yield tally.finding(f"SIGTERM, SIGINT, SIGUSR1 while {phase.name}", what)


def launched(lab: Lab) -> Iterator[Finding]:
    """Two processes under `accelerate launch`: a signal to the launcher, or to all at once as a terminal sends it."""
    tally = Tally()
    for phase in phases(lab):
        for number, group in ((signal.SIGTERM, False), (signal.SIGTERM, True), (signal.SIGINT, True)):
            _stop(lab, phase, number, tally, 2, group=group)
    yield tally.finding("SIGTERM, SIGINT, two processes", "in every phase, preparing included; every step is saved")
