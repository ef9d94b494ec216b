"""Chains: a command is killed and given again, unchanged and unattended, until it comes to its end."""

from __future__ import annotations

import random
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from faults.lab import Finding, Lab, Process

SEED = 4
_PAUSE_S = 0.0005


@dataclass
class Stages:
    """What is half written or half removed in a folder, by its hidden names.

    Args:
        folder: to look into.
        within: a pattern of the folders in it to look into instead, such as `*/*`.
    """

    folder: Path
    within: str = "."
    _older: set[str] = field(default_factory=set, init=False)

    def now(self) -> set[str]:
        """The hidden names, which differ from save to save."""
        found = (path.name for path in self.folder.glob(f"{self.within}/.*"))
        return {name for name in found if ".staged" in name or name.endswith((".removing", ".replaced"))}

    def note(self) -> None:
        """What is there now is an earlier command's."""
        self._older = self.now()

    def new(self) -> set[str]:
        """The hidden names that came after `note`; one that is swept and comes again is new."""
        now = self.now()
        self._older &= now
        return now - self._older

    def left(self) -> str:
        """What a kill left of the new ones; empty if nothing."""
        ends = {"half removed" if name.endswith(".removing") else "half written" for name in self.new()}
        return " and ".join(sorted(ends))


class Victim(ABC):
    """A command that one chain kills.

    Args:
        stages: where it writes.
    """

    def __init__(self, stages: Stages) -> None:
        self.stages = stages

    @abstractmethod
    def start(self) -> Process:
        """Gives the command: the same one every time."""

    @abstractmethod
    def moment(self, process: Process, rng: random.Random) -> bool:
        """Waits for the moment to kill; False if the process ended before."""

    @abstractmethod
    def after_kill(self) -> Iterator[str]:
        """What is wrong on the disk, where nobody writes now."""

    @abstractmethod
    def after_end(self) -> Iterator[str]:
        """What is not as the unbroken run left it."""


@dataclass
class Tally:
    """What all chains saw.

    Attributes:
        kills: done.
        ends: chains that came to their end.
        faults: what was wrong, a line each.
        left: how many kills left what half done.
    """

    kills: int = 0
    ends: int = 0
    faults: list[str] = field(default_factory=list)
    left: Counter[str] = field(default_factory=Counter)

    def finding(self, fault: str, lost: str) -> Finding:
        """The finding, with the figures in its note.

        Args:
            fault: which.
            lost: what a fault in the count would be.
        """
        caught = ", ".join(f"{count} left {what}" for what, count in sorted(self.left.items()) if what)
        note = f"{caught or 'nothing half done'}; restarted unattended, {self.ends} chains to the end; {lost}"
        first = f"; the first: {self.faults[0]}" if self.faults else ""
        return Finding(fault, self.kills, len(self.faults), not self.faults, f"{note}: {len(self.faults)}{first}")


def attack(lab: Lab, kills: int, make: Callable[[], Victim]) -> Tally:
    """Kills victims so often, one chain after the other, in as many lanes as the lab has."""
    tally, counting = Tally(), threading.Lock()

    def lane(number: int) -> None:
        """Chains until the kills are done."""
        rng = random.Random(f"{SEED}-{number}")
        while tally.kills < kills:
            with counting:
                victim = make()
            faults = list(_chain(victim, rng, tally, counting, kills))
            with counting:
                tally.ends, tally.faults = tally.ends + 1, tally.faults + faults

    with ThreadPoolExecutor(lab.lanes) as pool:
        list(pool.map(lane, range(lab.lanes)))
    return tally


def _chain(victim: Victim, rng: random.Random, tally: Tally, counting: threading.Lock, kills: int) -> Iterator[str]:
    while True:
        victim.stages.note()
        process = victim.start()
        if tally.kills < kills and victim.moment(process, rng) and process.runs:
            process.kill()
            with counting:
                tally.kills += 1
                tally.left[victim.stages.left()] += 1
            yield from victim.after_kill()
            continue
        code = process.wait()
        yield from victim.after_end() if code == 0 else [f"exit {code}: {' '.join(process.said.split())[-200:]}"]
        return


@dataclass(frozen=True)
class Pace:
    """How long an undisturbed command takes, by which the moments of kills are drawn.

    Attributes:
        life_s: from start to exit, in seconds.
        write_s: for which something is half done, in seconds; the median.
    """

    life_s: float
    write_s: float

    @classmethod
    def of(cls, start: Callable[[], Process], stages: Stages) -> Pace:
        """Starts the command and watches it to its end."""
        began, process = time.monotonic(), start()
        periods: list[float] = []
        since: list[float] = []

        def look() -> bool:
            """Notes beginnings and ends."""
            if bool(stages.now()) != bool(since):
                periods.append(time.monotonic() - since.pop()) if since else since.append(time.monotonic())
            return False

        process.wait_until(look)
        assert process.wait() == 0, process.said
        return cls(time.monotonic() - began, median(periods))

    def moment(self, process: Process, rng: random.Random) -> bool:
        """Waits for a random moment of a command's life; False if it ended before."""
        return _lives_for(process, rng.uniform(0, self.life_s))

    def moment_of_writing(self, process: Process, rng: random.Random, stages: Stages, most: int) -> bool:
        """Waits for the beginning of one of the next `most` files or folders and a random part of what one takes."""
        number, seen = rng.randint(1, most), set[str]()

        def came() -> bool:
            """Whether so many have begun."""
            seen.update(stages.new())
            return len(seen) >= number

        return process.wait_until(came, pause_s=_PAUSE_S) and _lives_for(process, rng.uniform(0, 1.2 * self.write_s))


def _lives_for(process: Process, seconds: float) -> bool:
    end = time.monotonic() + seconds
    return process.wait_until(lambda: time.monotonic() >= end, pause_s=_PAUSE_S)


def differing(one: Path, other: Path, names: list[str]) -> Iterator[str]:
    """The files of two folders that are not there or have other bytes, a line each."""
    for name in names:
        a, b = one / name, other / name
        if not a.exists() or not b.exists():
            yield f"{name} is missing"
        elif a.read_bytes() != b.read_bytes():
            yield f"{name} differs"
