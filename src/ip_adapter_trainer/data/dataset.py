"""From a place in the endless order to a decoded, cropped, augmented sample, and from samples to a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ip_adapter_trainer.core.errors import DataProblem
from ip_adapter_trainer.core.rng import stream
from ip_adapter_trainer.core.types import Batch, Fault, Geometry, Picture, Pixels, Row, Sample, map_tensors
from ip_adapter_trainer.data.config import CutConfig, DataConfig
from ip_adapter_trainer.data.layout import Layout, Size
from ip_adapter_trainer.data.manifest import Manifest
from ip_adapter_trainer.data.order import Pair
from ip_adapter_trainer.data.pictures import Pictures, fault_of
from ip_adapter_trainer.data.prepared import PreparedSet
from ip_adapter_trainer.images import crop
from ip_adapter_trainer.images.decode import PictureFault

Preprocess: TypeAlias = Callable[[Image.Image], Tensor]  # RGB picture to [3, S, S], as the image encoder wants it

MAX_TRIES = 16  # rows tried for one image; so many broken neighbours are no accident
_AHEAD_ROWS = 256  # looked through at first for rows of the same bucket; a set has millions


class TrainingSet(Dataset[Sample]):
    """Samples by (index, row). All chance is drawn from (seed, purpose, index): the same pair gives the same sample.

    Usage::

        samples = TrainingSet(manifest, config, layout, seed=0, preprocess=encoder.preprocess)
        batch = collate([samples[pair] for pair in order.step(0)])

    With a prepared set, samples hold what the encoders said of the same pictures; every draw and every replacement of
    a faulty row is the same.

    Raises:
        DataProblem: the manifest has no sound row.
    """

    def __init__(
        self,
        manifest: Manifest,
        config: DataConfig,
        layout: Layout,
        *,
        seed: int,
        preprocess: Preprocess,
        prepared: PreparedSet | None = None,
    ) -> None:
        if not manifest.rows:
            first = manifest.faults[0]
            raise DataProblem(f"no row can be used; the first: {first.what}", where=first.where, remedy=first.remedy)
        self.manifest, self.config, self.layout, self.seed = manifest, config, layout, seed
        self.preprocess, self.prepared = preprocess, prepared
        self._pictures = Pictures.of(manifest.root, config)

    def __len__(self) -> int:
        return len(self.manifest.rows)

    def __getitem__(self, pair: Pair) -> Sample:
        """The sample of an (index, row) pair; an unreadable row is replaced by the next one of its bucket.

        Raises:
            DataProblem: neither the row nor those after it can be read.
        """
        index, row = pair
        faults: list[Fault] = []
        for candidate in self._candidates(row):
            try:
                return self._sample(index, candidate, tuple(faults))
            except PictureFault as error:
                faults.append(fault_of(error, self.manifest.where(candidate)))
        what = f"{len(faults)} rows in turn cannot be read; the last: {faults[-1].what}"
        raise DataProblem(what, where=faults[-1].where, remedy="run `ip-adapter check` and mend the rows it names")

    def _candidates(self, row: int) -> Iterator[int]:
        """The row, then those that follow it in its bucket, around the end; each once, at most `MAX_TRIES`."""
        yield row
        buckets, tries, start, ahead = self.layout.bucket_of_row, 1, row + 1, _AHEAD_ROWS
        last = row + len(buckets)  # itself, once around
        while tries < MAX_TRIES and start < last:
            numbers = np.arange(start, min(start + ahead, last)) % len(buckets)
            mates = numbers[buckets[numbers] == buckets[row]][: MAX_TRIES - tries]
            yield from mates.tolist()
            tries, start, ahead = tries + len(mates), start + ahead, 2 * ahead

    def _sample(self, index: int, number: int, faults: tuple[Fault, ...]) -> Sample:
        row, config, target_px = self.manifest.rows[number], self.config, self.layout.size_px(number)
        flipped = config.random_flip and self._chance("flip", index).random() < 0.5
        if self.prepared is None:
            picture, geometry = self._read(row, index, target_px, flipped)
        else:
            picture, geometry = self.prepared.sample(row, target_px, flipped)
        drop_text, drop_image = drops(self._chance("drop", index).random(), config)
        return Sample(
            index=index,
            row=number,
            picture=picture,
            text=row.text,
            geometry=geometry,
            drop_text=drop_text,
            drop_image=drop_image,
            faults=faults,
        )

    def _read(self, row: Row, index: int, target_px: Size, flipped: bool) -> tuple[Picture, Geometry]:
        picture = self._pictures.read(row.image_file).image
        target = crop.mirror(picture) if flipped else picture
        own = row.prompt_image_file
        prompt = target if own is None else self._pictures.read(own).image
        cut, geometry = crop.fit(target, target_px, self._place(index))
        return Pixels(crop.to_tensor(cut), self.preprocess(self._augmented(prompt, index))), geometry

    def _augmented(self, prompt: Image.Image, index: int) -> Image.Image:
        config = self.config
        if config.prompt_crop_min_share < 1:
            chance = self._chance("prompt_crop", index)
            draws = (chance.random(), chance.random(), chance.random())
            prompt = crop.random_part(prompt, config.prompt_crop_min_share, draws)
        if config.prompt_flip and self._chance("prompt_flip", index).random() < 0.5:
            prompt = crop.mirror(prompt)
        return framed(prompt, config, self._pictures)

    def _place(self, index: int) -> tuple[float, float] | None:
        chance = self._chance("crop", index)
        return None if self.config.center_crop else (chance.random(), chance.random())

    def _chance(self, purpose: str, index: int) -> np.random.Generator:
        return stream(self.seed, purpose, index)


def framed(prompt: Image.Image, config: CutConfig, pictures: Pictures) -> Image.Image:
    """An image prompt as it goes to the encoder's preprocessing: padded to a square where the settings say so."""
    return crop.pad_to_square(prompt, pictures.ground) if config.prompt_pad_square else prompt


def drops(draw: float, config: DataConfig) -> tuple[bool, bool]:
    """Whether text and image are dropped, by one number in [0, 1): image only, then text only, then both."""
    image_below = config.image_drop_rate
    text_below = image_below + config.text_drop_rate
    both_below = text_below + config.both_drop_rate
    return image_below <= draw < both_below, draw < image_below or text_below <= draw < both_below


def collate(samples: Sequence[Sample]) -> Batch:
    """Samples of one size as a batch; a dropped text is empty."""
    return Batch(
        index=torch.tensor([s.index for s in samples]),
        row=torch.tensor([s.row for s in samples]),
        picture=map_tensors(lambda *tensors: torch.stack(tensors), *(s.picture for s in samples)),
        text=tuple("" if s.drop_text else s.text for s in samples),
        geometry=tuple(s.geometry for s in samples),
        drop_text=torch.tensor([s.drop_text for s in samples]),
        drop_image=torch.tensor([s.drop_image for s in samples]),
        faults=tuple(fault for s in samples for fault in s.faults),
    )
