"""One process's micro-batches, in order, from any step on; lost data workers are replaced at the exact place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count

from torch.utils.data import Dataset

from ip_adapter_trainer.core.errors import DataProblem
from ip_adapter_trainer.core.values import Batch, Fault, map_tensors
from ip_adapter_trainer.feed.dataset import TrainingSet
from ip_adapter_trainer.feed.sampler import Pair, Sampler, share
from ip_adapter_trainer.feed.workers import Pool, lost
from ip_adapter_trainer.manifest.faults import FaultLog
from ip_adapter_trainer.runtime.stopping import Poll, no_poll

Micro = Sequence[Pair]


@dataclass(frozen=True)
class Parcel:
    """What a data worker hands over: a batch, or what kept it from one (exceptions do not travel well)."""

    content: Batch | Fault

    def pin_memory(self) -> Parcel:
        """Called by the DataLoader's pinning thread, by this name."""
        batch = self.content
        if isinstance(batch, Fault):
            return self
        return Parcel(replace(batch, inputs=map_tensors(lambda t: t.pin_memory(), batch.inputs)))

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
        self, samples: TrainingSet, sampler: Sampler, log: FaultLog, *, rank: int = 0, world: int = 1, pin: bool = False
    ) -> None:
        self._samples, self._sampler, self._log = samples, sampler, log
        self._rank, self._world, self._pin = rank, world, pin
        self._micro_images = samples.config.train_batch_size
        self.micro_per_step, rest = divmod(sampler.batch_images, world * self._micro_images)
        assert rest == 0, "a step's images are train_batch_size * processes * accumulation"

    def from_step(self, step: int, poll: Poll = no_poll) -> Iterator[Batch]:
        """Micro-batches without end, beginning with the first of `step`; `poll` is called while one is waited for.

        Raises:
            DataProblem: too many faulty rows, or workers that are lost at one place again and again.
        """
        config = self._samples.config
        pool = Pool(
            dataset=_MicroBatches(self._samples),
            keys=self._micros,
            problem=self._lost,
            workers=config.dataloader_num_workers,
            ahead=config.prefetch_factor,
            timeout_s=config.data_timeout_s,
            poll=poll,
            pin=self._pin,
        )
        for parcel in pool.values(step * self.micro_per_step):
            batch = parcel.open()
            self._log.add(batch.faults)
            yield batch

    def _micros(self, place: int) -> Iterator[Micro]:
        """The pairs of this process's micro-batches from a place on, counted from the first step's first."""
        first, within = divmod(place, self.micro_per_step)
        for step in count(first):
            pairs = self._sampler.step(step)
            micros = share(pairs, rank=self._rank, world=self._world, micro_images=self._micro_images)
            yield from micros[within:]
            within = 0

    def _lost(self, micro: Micro, reason: str) -> DataProblem:
        rows = [row for _, row in micro]
        where = [self._samples.manifest.where(row) for row in rows]
        return lost(f"{len(rows)} rows", where, reason)
