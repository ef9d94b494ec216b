"""Both sides taking turns: times, peaks, saves and gradients, and what their ratios are."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from safetensors.torch import load_file

from benchmarks.worker import Contender, DoesNotFit, Worker

_BATCHES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)


@dataclass
class Measured:
    """What one side showed."""

    contender: Contender
    encode_s: list[float] = field(default_factory=list)  # per image
    train_s: list[float] = field(default_factory=list)  # per image
    peak_bytes: int = 0
    save_s: float = 0.0
    save_bytes: int = 0
    gradients: Path | None = None


@dataclass(frozen=True)
class Schedule:
    """How a comparison goes: rounds of turns, each of some steps."""

    rounds: int
    untimed: int  # steps at the start of a turn that are not timed: a GPU's memory was given back in between
    timed: int

    @property
    def steps(self) -> int:
        """Steps of all turns; the first turn only warms up."""
        return (self.rounds + 1) * (self.untimed + self.timed)


def ratio_of(published: Sequence[float], ours: Sequence[float]) -> tuple[float, float]:
    """Median over rounds of published / ours, and its spread: the middle half's width over the median."""
    ratios = sorted(a / b for a, b in zip(published, ours, strict=True))
    middle = statistics.median(ratios)
    if len(ratios) < 2:
        return middle, 0.0
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return middle, (high - low) / middle


def compare(pair: tuple[Contender, Contender], schedule: Schedule, folder: Path) -> tuple[Measured, Measured]:
    """Runs two sides by turns, A B A B.

    Raises:
        DoesNotFit: the device's memory is too small for one of them.
    """
    with Worker(pair[0], folder) as a, Worker(pair[1], folder) as b:
        sides = [(worker, Measured(worker.contender)) for worker in (a, b)]
        encodes = not any(c.side == "ours" for c in pair[:1])  # two of ours have nothing to compare here
        for i in range(schedule.rounds + 1 if encodes else 0):
            for worker, found in sides:
                seconds = worker.ask("encode")
                found.encode_s += [seconds] if i else []
        for worker, found in sides:
            worker.ask("prepare")
            found.gradients = Path(worker.ask("gradients"))
            worker.begin(schedule.steps)
        for i in range(schedule.rounds + 1):
            for worker, found in sides:
                _turn(worker, found, schedule, worker.contender.images, counts=i > 0)
        for worker, found in sides:
            found.save_s, found.save_bytes = worker.finish()
        return sides[0][1], sides[1][1]


def _turn(worker: Worker, found: Measured, schedule: Schedule, images: int, *, counts: bool) -> None:
    turn = worker.turn(schedule.untimed, schedule.timed)
    found.train_s += [turn.seconds / (schedule.timed * images)] if counts else []
    found.peak_bytes = turn.peak_bytes


def alone(contender: Contender, schedule: Schedule, folder: Path) -> tuple[Measured, int]:
    """One side by itself at the largest batch that its device holds; returns that batch too.

    Raises:
        DoesNotFit: not even one image fits.
    """
    with Worker(contender, folder) as worker:
        found = Measured(contender)
        worker.ask("prepare")
        images = worker.ask("largest", _BATCHES)
        if images == 0:
            raise DoesNotFit("not even one image fits")
        worker.begin(schedule.steps)
        for i in range(schedule.rounds + 1):
            _turn(worker, found, schedule, images, counts=i > 0)
        worker.finish()
        return found, images


def gradients_only(contender: Contender, folder: Path) -> Path:
    """The file of one side's gradients, without a run."""
    with Worker(contender, folder) as worker:
        worker.ask("prepare")
        return Path(worker.ask("gradients"))


def difference(gradients: Path, reference: Path) -> float:
    """Relative L2 difference of all the adapter's gradients, || g - r || / || r ||."""
    assert gradients != reference, "compared with itself"
    mine, theirs = load_file(gradients), load_file(reference)
    assert mine.keys() == theirs.keys(), mine.keys() ^ theirs.keys()
    error = sum(float((mine[k] - theirs[k]).double().square().sum()) for k in theirs)
    return math.sqrt(error / sum(float(r.double().square().sum()) for r in theirs.values()))
