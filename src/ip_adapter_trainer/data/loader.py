"""One process's micro-batches, in order, from any step on; lost data workers are replaced at the exact place."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count

from torch.utils.data import DataLoader, Dataset

from ip_adapter_trainer.core.errors import DataProblem, Problem
from ip_adapter_trainer.core.types import Batch
from ip_adapter_trainer.data.dataset import TrainingSet, collate
from ip_adapter_trainer.data.faults import FaultLog
from ip_adapter_trainer.data.order import Order, Pair, share

Micro = Sequence[Pair]

MAX_REPLACEMENTS = 3  # of the workers, at one place
_PINNED = ("pixels", "prompt_pixels")
_LOSSES = ("DataLoader ", "Pin memory ")  # torch's errors about dead and hung workers; a worker's own begin otherwise


@dataclass(frozen=True)
class Parcel:
    """What a data worker hands over: a batch, or the problem that kept it from one."""

    content: Batch | Problem

    def pin_memory(self) -> Parcel:
        """Called by the DataLoader's pinning thread, by this name."""
        batch = self.content
        if isinstance(batch, Problem):
            return self
        return Parcel(replace(batch, **{name: getattr(batch, name).pin_memory() for name in _PINNED}))


class _MicroBatches(Dataset[Parcel]):
    """Whole micro-batches by their pairs, so that workers stack what they read."""

    def __init__(self, samples: TrainingSet) -> None:
        self._samples = samples

    def __getitem__(self, micro: Micro) -> Parcel:
        try:
            return Parcel(collate([self._samples[pair] for pair in micro]))
        except Problem as problem:
            return Parcel(problem)


class Loader:
    """The batches of one process.

    Usage::

        loader = Loader(samples, order, log, rank=0, world=1)
        batches = loader.from_step(1200)
        for _ in range(loader.micro_per_step):
            batch = next(batches)

    Attributes:
        micro_per_step: micro-batches that make one process's part of a step.
    """

    def __init__(
        self, samples: TrainingSet, order: Order, log: FaultLog, *, rank: int = 0, world: int = 1, pin: bool = False
    ) -> None:
        self._samples, self._order, self._log = samples, order, log
        self._rank, self._world, self._pin = rank, world, pin
        self._micro_images = samples.config.train_batch_size
        self.micro_per_step, rest = divmod(order.batch_images, world * self._micro_images)
        assert rest == 0, "a step's images are train_batch_size * processes * accumulation"

    def from_step(self, step: int) -> Iterator[Batch]:
        """Micro-batches without end, beginning with the first of `step`.

        Raises:
            DataProblem: too many faulty rows, or workers that are lost at one place again and again.
        """
        place = step * self.micro_per_step
        losses = 0
        while True:
            try:
                for parcel in self._parcels(place):
                    if isinstance(parcel.content, Problem):
                        raise parcel.content
                    self._log.add(parcel.content.faults)
                    place, losses = place + 1, 0
                    yield parcel.content
            except RuntimeError as error:
                if not str(error).startswith(_LOSSES):
                    raise
                losses += 1
                if losses > MAX_REPLACEMENTS:
                    raise self._lost(place, error) from error

    def _micros(self, place: int) -> Iterator[Micro]:
        """The pairs of this process's micro-batches from a place on, counted from the first step's first."""
        first, within = divmod(place, self.micro_per_step)
        for step in count(first):
            pairs = self._order.step(step)
            micros = share(pairs, rank=self._rank, world=self._world, micro_images=self._micro_images)
            yield from micros[within:]
            within = 0

    def _parcels(self, place: int) -> Iterator[Parcel]:
        config = self._samples.config
        workers = config.dataloader_num_workers
        loader = DataLoader(
            _MicroBatches(self._samples),
            batch_size=None,
            sampler=self._micros(place),
            num_workers=workers,
            prefetch_factor=config.prefetch_factor if workers else None,
            timeout=config.data_timeout_s if workers else 0,
            pin_memory=self._pin,
        )
        with _child_signal_kept():
            return iter(loader)

    def _lost(self, place: int, error: RuntimeError) -> DataProblem:
        rows = [row for _, row in next(self._micros(place))]
        what = f"the data workers were lost {MAX_REPLACEMENTS + 1} times over the same {len(rows)} rows"
        where = "; ".join(self._samples.manifest.where(row) for row in rows)
        remedy = "try with --dataloader_num_workers 0, with more memory, or without these rows"
        return DataProblem(f"{what} ({str(error).splitlines()[0]})", where=where, remedy=remedy)


@contextmanager
def _child_signal_kept() -> Iterator[None]:
    """Undoes torch's SIGCHLD handler, which raises in the middle of whatever runs; the loader polls its workers too."""
    before = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
    try:
        yield
    finally:
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, before)
