"""Both sides taking turns: times, peaks, saves and gradients, and what their ratios are."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from safetensors.torch import load_file

from benchmarks.aside import DoesNotFit, Failed
from benchmarks.pictures import Files
from benchmarks.worker import Contender, Order, Worker

_BATCHES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)


@dataclass
class Measured:
    """What one side showed; it stays empty from where its process failed."""

    contender: Contender
    images: int  # a step
    prepare_s: list[float] = field(default_factory=list)  # per image
    train_s: list[float] = field(default_factory=list)  # per image
    waited: list[float] = field(default_factory=list)  # for data, share of a step's time
    save_s: list[float] = field(default_factory=list)  # what a checkpoint adds to the steps around it
    peak_bytes: int | None = None
    save_bytes: int | None = None
    gradients: Path | None = None
    failure: str | None = None


@dataclass(frozen=True)
class Schedule:
    """How a comparison goes: rounds of turns, each of some steps.

    Attributes:
        rounds: that count; one more before them warms up.
        untimed: steps at the start of a turn that are not timed: a GPU's memory was given back in between.
        timed: steps of a turn.
        files: pictures that each side makes ready in each round; our side then also trains from them.
        saving: least steps of a turn with a checkpoint in its middle, and then of one without; 0: no checkpoints.
        largest: each side looks for its largest batch first.
    """

    rounds: int
    untimed: int
    timed: int
    files: Files | None = None
    saving: int = 0
    largest: bool = False


Stage = Callable[[Worker, Measured], None]


def ratio_of(published: Sequence[float], ours: Sequence[float]) -> tuple[float, float]:
    """Median over rounds of published / ours, and its spread: the middle half's width over the median."""
    ratios = [a / b for a, b in zip(published, ours, strict=True)]
    middle = statistics.median(ratios)
    return middle, middle_half(ratios) / middle


def middle_half(values: Sequence[float]) -> float:
    """Width of the middle half of some values."""
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return high - low


def compare(contenders: Sequence[Contender], schedule: Schedule, folder: Path) -> list[Measured]:
    """Runs sides by turns, A B A B; one whose process fails is left behind, and the others go on."""
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker(contender, folder)) for contender in contenders]
        sides = [(worker, Measured(worker.contender, worker.contender.images)) for worker in workers]
        for stage in _stages(schedule):
            for worker, found in sides:
                if found.failure is None:
                    _try(stage, worker, found)
        return [found for _, found in sides]


def _try(stage: Stage, worker: Worker, found: Measured) -> None:
    try:
        stage(worker, found)
    except Failed as error:
        print(error.trace, file=sys.stderr)
        found.failure = error.reason
        worker.end()


def _stages(schedule: Schedule) -> Iterator[Stage]:
    """What every side does in turn."""
    rounds = range(schedule.rounds)
    if schedule.files is not None:
        for i in range(schedule.rounds + 1):
            yield partial(_prepare_pictures, schedule.files, counts=i > 0)
    yield partial(_begin, schedule)
    for i in range(schedule.rounds + 1):
        yield partial(_train, schedule, counts=i > 0)
    if schedule.files is not None:
        yield from (partial(_train_from_files, schedule) for _ in rounds)
    if schedule.saving:
        yield from (partial(_save, schedule) for _ in rounds)
    yield _finish


def _prepare_pictures(files: Files, worker: Worker, found: Measured, *, counts: bool) -> None:
    seconds = worker.ask("prepare_pictures", files)
    found.prepare_s += [seconds] if counts else []


def _begin(schedule: Schedule, worker: Worker, found: Measured) -> None:
    worker.ask("prepare")
    if schedule.largest:
        found.images = worker.ask("largest", _BATCHES)
        if found.images == 0:
            raise DoesNotFit("not even one image fits")
    else:
        found.gradients = Path(worker.ask("gradients"))
    worker.begin()


def _train(schedule: Schedule, worker: Worker, found: Measured, *, counts: bool) -> None:
    turn = worker.turn(Order(schedule.untimed, schedule.timed))
    found.train_s += [turn.seconds / (turn.steps * found.images)] if counts else []
    found.peak_bytes = turn.peak_bytes


def _train_from_files(schedule: Schedule, worker: Worker, found: Measured) -> None:
    if worker.contender.side == "ours":
        turn = worker.turn(Order(schedule.untimed, schedule.timed, reads=True))
        found.waited.append(turn.waited_s / turn.seconds)


def _save(schedule: Schedule, worker: Worker, found: Measured) -> None:
    """Steps with a checkpoint among them, all written when they end, and as many without."""
    saving = worker.turn(Order(schedule.untimed, schedule.saving, saves=True))
    plain = worker.turn(Order(schedule.untimed, saving.steps))
    found.save_s.append(saving.seconds - plain.seconds)


def _finish(worker: Worker, found: Measured) -> None:
    found.save_bytes = worker.finish() or None


def gradients_only(contender: Contender, folder: Path) -> Path:
    """The file of one side's gradients, without a run.

    Raises:
        Failed: it cannot be had.
    """
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
