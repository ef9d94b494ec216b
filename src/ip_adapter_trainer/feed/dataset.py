"""Batches of training images: drawn by index, read from rows, with other rows in place of faulty ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from ip_adapter_trainer.cache.prepared import PreparedSet
from ip_adapter_trainer.core.errors import DataProblem, Fault
from ip_adapter_trainer.core.rng import stream
from ip_adapter_trainer.core.values import Batch, Geometry, Row
from ip_adapter_trainer.feed.bucketing import MAX_TRIES, Bucketing
from ip_adapter_trainer.feed.config import DataConfig
from ip_adapter_trainer.feed.readers import CacheSlotReader, Cutter, ImageSlotReader, Preprocess, Slot, SlotReader
from ip_adapter_trainer.feed.sampler import Pair
from ip_adapter_trainer.images.decode import ImageFault
from ip_adapter_trainer.manifest.images import ImageFiles, fault_of
from ip_adapter_trainer.manifest.manifest import Manifest

_AHEAD_ROWS = 256  # looked through at first for rows of the same bucket; a set has millions


class TrainingSet:
    """Batches by (index, row). All chance is drawn from (seed, purpose, index): the same pair gives the same sample.

    With a prepared set, batches hold the encodings of the same images; every draw and every replacement of
    a faulty row is the same.

    Raises:
        DataProblem: the manifest has no sound row.
    """

    def __init__(
        self,
        manifest: Manifest,
        config: DataConfig,
        bucketing: Bucketing,
        *,
        seed: int,
        preprocess: Mapping[str, Preprocess],
        prepared: PreparedSet | None = None,
        max_tries: int = MAX_TRIES,
    ) -> None:
        if not manifest.rows:
            first = manifest.faults[0]
            raise DataProblem(f"no row can be used; the first: {first.what}", where=first.where, remedy=first.remedy)
        self.manifest, self.config, self.bucketing, self.seed = manifest, config, bucketing, seed
        self.preprocess, self.prepared, self._max_tries = preprocess, prepared, max_tries
        self._cutter = Cutter(ImageFiles.of(manifest.root, config), config, preprocess, seed)

    def __len__(self) -> int:
        return len(self.manifest.rows)

    def batch(self, pairs: Sequence[Pair]) -> Batch:
        """Return the samples of (index, row) pairs of one bucket; its next row stands in for an unreadable one.

        Raises:
            DataProblem: neither a row nor those after it can be read.
        """
        slots, target_px = [self._slot(index) for index, _ in pairs], self.bucketing.size_px(pairs[0][1])
        reader: SlotReader = ImageSlotReader(self._cutter, slots, target_px)
        if self.prepared is not None:
            reader = CacheSlotReader(self.prepared, slots, target_px)
        taken = self._read(reader, [row for _, row in pairs])
        return Batch(
            index=torch.tensor([slot.index for slot in slots]),
            row=torch.tensor([one.number for one in taken]),
            inputs=reader.inputs(),
            text=tuple(slot.text_of(one.row) for slot, one in zip(slots, taken, strict=True)),
            geometry=tuple(one.geometry for one in taken),
            drop_text=torch.tensor([slot.drop_text for slot in slots]),
            drop_image=torch.tensor([slot.drop_image for slot in slots]),
            faults=tuple(fault for one in taken for fault in one.faults),
        )

    def _slot(self, index: int) -> Slot:
        mirrored = self.config.random_flip and stream(self.seed, "flip", index).random() < 0.5
        drop_text, drop_image = drops(stream(self.seed, "drop", index).random(), self.config)
        return Slot(self.seed, index, mirrored, drop_text, drop_image)

    def _read(self, reader: SlotReader, numbers: Sequence[int]) -> list[_Taken]:
        """Fills every slot, with the row of that number or with one that stands in for it."""
        turns = [_Turn(self._candidates(number)) for number in numbers]
        waiting = list(range(len(numbers)))
        taken: dict[int, _Taken] = {}
        while waiting:
            chosen = [turns[slot].next() for slot in waiting]
            rows = [self.manifest.rows[number] for number in chosen]
            read = reader.read(rows, waiting)
            for slot, number, row, found in zip(waiting, chosen, rows, read, strict=True):
                if isinstance(found, ImageFault):
                    turns[slot].faults.append(fault_of(found, self.manifest.where(number)))
                else:
                    taken[slot] = _Taken(number, row, found, turns[slot].faults)
            waiting = [slot for slot in waiting if slot not in taken]
        return [taken[slot] for slot in range(len(numbers))]

    def _candidates(self, row: int) -> Iterator[int]:
        """The row, then those that follow it in its bucket, around the end; each once, at most `max_tries`."""
        yield row
        buckets, tries, start, ahead = self.bucketing.bucket_of_row, 1, row + 1, _AHEAD_ROWS
        last = row + len(buckets)  # itself, once around
        while tries < self._max_tries and start < last:
            numbers = np.arange(start, min(start + ahead, last)) % len(buckets)
            mates = numbers[buckets[numbers] == buckets[row]][: self._max_tries - tries]
            yield from mates.tolist()
            tries, start, ahead = tries + len(mates), start + ahead, 2 * ahead


class _Taken(NamedTuple):
    """The row that an image was taken from."""

    number: int
    row: Row
    geometry: Geometry
    faults: list[Fault]  # of the rows that were tried before


class _Turn:
    """The rows that may be taken for one image, in turn, and what was wrong with those that were tried."""

    def __init__(self, candidates: Iterator[int]) -> None:
        self._candidates = candidates
        self.faults: list[Fault] = []

    def next(self) -> int:
        """Return the next row to try.

        Raises:
            DataProblem: all were tried.
        """
        number = next(self._candidates, None)
        if number is None:
            last = self.faults[-1]
            what = f"{len(self.faults)} rows in turn cannot be read; the last: {last.what}"
            raise DataProblem(what, where=last.where, remedy="run `ip-adapter check` and mend the rows it names")
        return number


def drops(draw: float, config: DataConfig) -> tuple[bool, bool]:
    """Return whether text and image are dropped, from one number in [0, 1).

    The lowest numbers drop the image only, those above them the text only, those above these both.
    """
    image_below = config.image_drop_rate
    text_below = image_below + config.text_drop_rate
    both_below = text_below + config.both_drop_rate
    return image_below <= draw < both_below, draw < image_below or text_below <= draw < both_below
