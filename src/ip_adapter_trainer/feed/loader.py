"""The micro-batches of one process, in order, from any step on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count

from ip_adapter_trainer.core.values import Batch
from ip_adapter_trainer.feed.dataset import TrainingSet
from ip_adapter_trainer.feed.sampler import Pair, Sampler, share
from ip_adapter_trainer.manifest.faults import FaultLog
from ip_adapter_trainer.runtime.stopping import Poll, no_poll
from ip_adapter_trainer.runtime.workers import Pool


class Loader:
    """Gives the batches of one process, `micro_per_step` for its part of a step."""

    def __init__(
        self,
        samples: TrainingSet,
        sampler: Sampler,
        log: FaultLog,
        micro_images: int,
        *,
        rank: int = 0,
        world: int = 1,
        pin: bool = False,
    ) -> None:
        self._samples, self._sampler, self._log = samples, sampler, log
        self._rank, self._world, self._pin = rank, world, pin
        self._micro_images = micro_images
        self.micro_per_step, rest = divmod(sampler.batch_images, world * self._micro_images)
        assert rest == 0, "a step's images are those of whole micro-batches of every process"

    def from_step(self, step: int, poll: Poll = no_poll) -> Iterator[Batch]:
        """Yield micro-batches without end, from the first of `step` on; `poll` is called while one is waited for.

        Raises:
            DataProblem: too many faulty rows, or workers that are lost over one batch again and again.
        """
        config = self._samples.config
        pool = Pool(
            self._samples.batch,
            where=lambda micro: "; ".join(self._samples.manifest.where(row) for _, row in micro),
            workers=config.dataloader_num_workers or 0,
            timeout_s=config.data_timeout_s,
            ahead=config.prefetch_factor,
            pin=self._pin,
            poll=poll,
        )
        for batch in pool.values(self._micros(step)):
            self._log.add(batch.faults)
            yield batch

    def _micros(self, first: int) -> Iterator[Sequence[Pair]]:
        """Yield the pairs of this process's micro-batches from a step on."""
        for step in count(first):
            pairs = self._sampler.step(step)
            yield from share(pairs, rank=self._rank, world=self._world, micro_images=self._micro_images)
