"""One process's micro-batches, in order, from any step on; lost data workers are replaced at the exact place."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count, islice
from multiprocessing.process import BaseProcess
from typing import Any

from torch.utils.data import DataLoader, Dataset

from ip_adapter_trainer.core.errors import DataProblem
from ip_adapter_trainer.core.log import say
from ip_adapter_trainer.core.types import Batch, Fault, map_tensors
from ip_adapter_trainer.data.dataset import TrainingSet
from ip_adapter_trainer.data.faults import FaultLog
from ip_adapter_trainer.data.order import Order, Pair, share

Micro = Sequence[Pair]

MAX_REPLACEMENTS = 3  # of the workers, at one place
_POLL_S = 1.0
_TIMED_OUT = "DataLoader timed out"
_RAISED_IN_WORKER = "Caught "  # how torch begins what it hands over; all else tells of dead or hung workers


@dataclass(frozen=True)
class Parcel:
    """What a data worker hands over: a batch, or what kept it from one (exceptions do not travel well)."""

    content: Batch | Fault

    def pin_memory(self) -> Parcel:
        """Called by the DataLoader's pinning thread, by this name."""
        batch = self.content
        if isinstance(batch, Fault):
            return self
        return Parcel(replace(batch, picture=map_tensors(lambda t: t.pin_memory(), batch.picture)))

    def open(self) -> Batch:
        """The batch.

        Raises:
            DataProblem: there is none.
        """
        if isinstance(self.content, Fault):
            raise DataProblem(self.content.what, where=self.content.where, remedy=self.content.remedy)
        return self.content


class _MicroBatches(Dataset[Parcel]):
    """Whole micro-batches by their pairs, as torch's loader asks for them."""

    def __init__(self, samples: TrainingSet) -> None:
        self._samples = samples

    def __getitem__(self, micro: Micro) -> Parcel:
        try:
            return Parcel(self._samples.batch(micro))
        except DataProblem as problem:
            return Parcel(Fault("unreadable_rows", problem.what, problem.where, problem.remedy))


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
        place, losses = step * self.micro_per_step, 0
        parcels = self._parcels(place, cautiously=False)
        while True:
            try:
                parcel = next(parcels)
            except (RuntimeError, OSError, EOFError) as error:
                losses += 1
                self._demand_loss_of_workers(error, place, losses)
                parcels = self._parcels(place, cautiously=True)
                continue
            batch = parcel.open()
            self._log.add(batch.faults)
            place, losses = place + 1, 0
            yield batch

    def _demand_loss_of_workers(self, error: Exception, place: int, losses: int) -> None:
        """Returns if workers died or hung and may be replaced once more."""
        if self._samples.config.dataloader_num_workers == 0 or str(error).startswith(_RAISED_IN_WORKER):
            raise error
        reason = (str(error) or type(error).__name__).splitlines()[0]
        if losses > MAX_REPLACEMENTS:
            raise self._lost(place, reason) from error
        say(f"data workers were lost and are replaced ({losses} of {MAX_REPLACEMENTS} times here): {reason}")

    def _micros(self, place: int) -> Iterator[Micro]:
        """The pairs of this process's micro-batches from a place on, counted from the first step's first."""
        first, within = divmod(place, self.micro_per_step)
        for step in count(first):
            pairs = self._order.step(step)
            micros = share(pairs, rank=self._rank, world=self._world, micro_images=self._micro_images)
            yield from micros[within:]
            within = 0

    def _parcels(self, place: int, *, cautiously: bool) -> Iterator[Parcel]:
        """Parcels from a place on; `cautiously` fetches what was under way one by one, so that blame falls rightly."""
        workers, ahead = self._samples.config.dataloader_num_workers, self._samples.config.prefetch_factor
        if cautiously:
            yield from islice(self._pool(place, workers=1, ahead=1), workers * ahead)
            place += workers * ahead
        yield from self._pool(place, workers, ahead)

    def _pool(self, place: int, workers: int, ahead: int) -> Iterator[Parcel]:
        loader = DataLoader(
            _MicroBatches(self._samples),
            batch_size=None,
            sampler=self._micros(place),
            num_workers=workers,
            prefetch_factor=ahead if workers else None,
            timeout=_POLL_S if workers else 0,
            pin_memory=self._pin,
        )
        with _child_signal_kept():
            parcels: Any = iter(loader)
        processes: list[BaseProcess] = list(parcels._workers) if workers else []
        try:
            while True:
                yield _next(parcels, processes, self._samples.config.data_timeout_s)
        finally:
            del parcels  # torch takes leave of its workers, but waits for one that is stopped until the program's end
            _end(processes)

    def _lost(self, place: int, reason: str) -> DataProblem:
        rows = [row for _, row in next(self._micros(place))]
        what = f"the data workers were lost {MAX_REPLACEMENTS + 1} times over the same {len(rows)} rows ({reason})"
        where = "; ".join(self._samples.manifest.where(row) for row in rows)
        remedy = "try --dataloader_num_workers 0, more memory, or a manifest without these rows"
        return DataProblem(what, where=where, remedy=remedy)


def _next(parcels: Iterator[Parcel], workers: Sequence[BaseProcess], patience_s: float) -> Parcel:
    """Waits in short turns, between which torch looks whether its workers are alive.

    Torch's own time limit is none where a worker is stopped that has begun to hand over: it must answer to the end, or
    be gone. So workers are ended when time is up.
    """
    if not workers:
        return next(parcels)
    is_late = threading.Event()

    def end() -> None:
        """Time is up."""
        is_late.set()
        _end(workers)

    timer = threading.Timer(patience_s, end)
    timer.daemon = True
    timer.start()
    try:
        while True:
            try:
                return next(parcels)
            except (RuntimeError, OSError, EOFError) as error:
                if is_late.is_set():
                    raise TimeoutError(f"no batch in {patience_s:g} s") from error
                if not str(error).startswith(_TIMED_OUT):
                    raise
    finally:
        timer.cancel()


def _end(workers: Sequence[BaseProcess]) -> None:
    for worker in workers:
        worker.kill()


@contextmanager
def _child_signal_kept() -> Iterator[None]:
    """Undoes torch's SIGCHLD handler, which raises in the middle of whatever runs; the workers are polled."""
    before = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
    try:
        yield
    finally:
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, before)
