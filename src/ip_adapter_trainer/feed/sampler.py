"""The endless order of training: which rows make step k, for any k, without replaying the steps before.

Rows whose bucket is -1 are not trained on. The rows of each other bucket form an endless stream: epoch after epoch,
each a permutation of the bucket's n_b rows drawn from the counter stream (seed, "order", epoch, bucket). The stream is
cut into batches of G images without regard to the epochs' ends, so nothing is dropped: what does not fill a batch opens
the next epoch's first. A batch belongs to the epoch that its last image is of; epoch e therefore owns, of bucket b, the
batches

    floor(e n_b / G)  ...  floor((e + 1) n_b / G) - 1

and trains on all buckets' batches in an order drawn from (seed, "batches", e). An image's index in the endless order is

    index = e N + (rows of the buckets before b) + (place in the bucket's permutation of epoch e)

for N rows in all: a bijection that knows neither the batch size nor the number of processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ip_adapter_trainer.core.rng import stream

Pair = tuple[int, int]  # index in the endless order, row
Item = TypeVar("Item")


class Sampler:
    """Steps of `batch_images` images, all of one bucket."""

    def __init__(self, bucket_of_row: ArrayLike, *, seed: int, batch_images: int) -> None:
        numbers = np.asarray(bucket_of_row)
        self._numbers = np.unique(numbers[numbers >= 0])  # empty buckets have no stream
        assert len(self._numbers) and batch_images > 0
        self.seed, self.batch_images, self.rows = seed, batch_images, int((numbers >= 0).sum())
        self._members = [np.flatnonzero(numbers == number) for number in self._numbers]
        self._sizes = np.array([len(rows) for rows in self._members], dtype=np.int64)
        self._before = np.cumsum(self._sizes) - self._sizes
        self._permutation = lru_cache(maxsize=2 * len(self._members) + 2)(self._draw_permutation)
        self._shuffled = lru_cache(maxsize=2)(self._draw_batches)

    def steps_before(self, epoch: int) -> int:
        """Return the number of steps before this epoch, which is also the number that so many epochs take."""
        return int((epoch * self._sizes // self.batch_images).sum())

    def epoch_of(self, step: int) -> int:
        """Return the epoch of a step: the one epoch e with steps_before(e) <= step < steps_before(e + 1)."""
        low = step * self.batch_images // self.rows  # no more steps than rows fit before an epoch
        high = low + 1
        while self.steps_before(high) <= step:
            high += high - low
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.steps_before(middle) <= step else (low, middle)
        return low

    def slow_buckets(self) -> list[tuple[int, int]]:
        """Return number and images of each bucket that has fewer images than a step.

        They are not trained on once an epoch, but several times in one step of every few.
        """
        pairs = zip(self._numbers.tolist(), self._sizes.tolist(), strict=True)
        return [(number, images) for number, images in pairs if images < self.batch_images]

    def never_seen(self, steps: int) -> int:
        """Return how many images are in none of the first so many steps."""
        epoch = self.epoch_of(steps)
        batches = epoch * self._sizes // self.batch_images
        begun = self._shuffled(epoch)[: steps - self.steps_before(epoch), 0]
        batches += np.bincount(begun, minlength=len(self._sizes))
        return int(np.maximum(self._sizes - batches * self.batch_images, 0).sum())

    def step(self, step: int) -> list[Pair]:
        """Return the (index, row) pairs of a step."""
        epoch = self.epoch_of(step)
        bucket, batch = self._shuffled(epoch)[step - self.steps_before(epoch)]
        places = np.arange(batch * self.batch_images, (batch + 1) * self.batch_images)  # in the bucket's stream
        epochs, ranks = np.divmod(places, self._sizes[bucket])
        indices = epochs * self.rows + self._before[bucket] + ranks
        rows = [self._permutation(int(e), int(bucket))[rank] for e, rank in zip(epochs, ranks, strict=True)]
        return list(zip(indices.tolist(), map(int, rows), strict=True))

    def _draw_permutation(self, epoch: int, bucket: int) -> NDArray[np.int64]:
        return stream(self.seed, "order", epoch, int(self._numbers[bucket])).permutation(self._members[bucket])

    def _draw_batches(self, epoch: int) -> NDArray[np.int64]:
        """(bucket, number of the batch in the bucket's stream) of each step of an epoch, [steps, 2]."""
        starts, ends = (e * self._sizes // self.batch_images for e in (epoch, epoch + 1))
        buckets = np.repeat(np.arange(len(self._sizes)), ends - starts)
        batches = np.concatenate([np.arange(start, end) for start, end in zip(starts, ends, strict=True)])
        return stream(self.seed, "batches", epoch).permutation(np.stack([buckets, batches], axis=1))


def share(batch: Sequence[Item], *, rank: int, world: int, micro_images: int) -> list[Sequence[Item]]:
    """Return the micro-batches of one process: its own `micro_images` out of each `world * micro_images` in turn.

    Over all ranks the micro-batches make up the step's batch, whatever the number of processes.
    """
    stride = world * micro_images
    assert len(batch) % stride == 0 and 0 <= rank < world
    starts = range(rank * micro_images, len(batch), stride)
    return [batch[start : start + micro_images] for start in starts]
