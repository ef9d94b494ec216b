"""Readers that fill a batch with images, slot by slot: from the files themselves, or from a prepared set."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from PIL import Image
from torch import Tensor

from ip_adapter_trainer.cache.config import CutConfig
from ip_adapter_trainer.cache.prepared import Asked, PreparedSet
from ip_adapter_trainer.core.rng import stream
from ip_adapter_trainer.core.values import Geometry, Inputs, Pixels, Row, Size, map_tensors
from ip_adapter_trainer.images import crop
from ip_adapter_trainer.images.decode import ImageFault
from ip_adapter_trainer.manifest.images import ImageFiles

Preprocess: TypeAlias = Callable[[Image.Image], Tensor]  # RGB image to [3, S, S], as the image encoder wants it


@dataclass(frozen=True)
class Slot:
    """One image of a batch, as drawn before its row is read."""

    seed: int
    index: int  # in the endless order
    mirrored: bool
    drop_text: bool
    drop_image: bool

    def text_of(self, row: Row) -> str:
        """Return the caption that the image is trained with if it is taken from this row; empty where it is dropped."""
        return "" if self.drop_text else row.caption(self.seed, self.index)


class SlotReader(Protocol):
    """Fills the slots of one batch, all of one size."""

    def read(self, rows: Sequence[Row], slots: Sequence[int]) -> list[Geometry | ImageFault]:
        """Read each row into its slot; return how each target was cut, or why a slot is empty."""

    def inputs(self) -> Inputs:
        """Return the batch, [B, ...], once every slot is filled."""


class Cutter:
    """Reads and cuts images. All chance is drawn from (seed, purpose, index)."""

    def __init__(self, images: ImageFiles, config: CutConfig, preprocess: Mapping[str, Preprocess], seed: int) -> None:
        self._images, self._config, self._preprocess, self._seed = images, config, preprocess, seed

    def cut(self, row: Row, index: int, target_px: Size, mirrored: bool) -> tuple[Pixels, Geometry]:
        """Return target and image prompt of one row.

        Raises:
            ImageFault: one of them cannot be read.
        """
        image = self._images.read(row.image_file).image
        target = crop.mirror(image) if mirrored else image
        own = row.prompt_image_file
        prompt = target if own is None else self._images.read(own).image
        chance = None if self._config.center_crop else stream(self._seed, "crop", index)
        place = None if chance is None else (chance.random(), chance.random())
        cut, geometry = crop.fit(target, target_px, place)
        seen = self._augmented(prompt, index)
        prompts = {role: preprocess(seen) for role, preprocess in self._preprocess.items()}
        return Pixels(crop.to_tensor(cut), prompts), geometry

    def _augmented(self, prompt: Image.Image, index: int) -> Image.Image:
        config = self._config
        if config.prompt_crop_min_share < 1:
            chance = stream(self._seed, "prompt_crop", index)
            draws = (chance.random(), chance.random(), chance.random())
            prompt = crop.random_part(prompt, config.prompt_crop_min_share, draws)
        if config.prompt_flip and stream(self._seed, "prompt_flip", index).random() < 0.5:
            prompt = crop.mirror(prompt)
        return framed(prompt, config, self._images)


def framed(prompt: Image.Image, config: CutConfig, images: ImageFiles) -> Image.Image:
    """Return an image prompt as the encoder's preprocessing takes it: padded to a square where the settings say so."""
    return crop.pad_to_square(prompt, images.background) if config.prompt_pad_square else prompt


class ImageSlotReader:
    """Fills a batch with images read from their files."""

    def __init__(self, cutter: Cutter, batch: Sequence[Slot], target_px: Size) -> None:
        self._cutter, self._batch, self._target_px = cutter, batch, target_px
        self._pixels: dict[int, Pixels] = {}

    def read(self, rows: Sequence[Row], slots: Sequence[int]) -> list[Geometry | ImageFault]:
        """See `SlotReader.read`."""
        return [self._read(row, slot) for row, slot in zip(rows, slots, strict=True)]

    def _read(self, row: Row, slot: int) -> Geometry | ImageFault:
        drawn = self._batch[slot]
        try:
            self._pixels[slot], geometry = self._cutter.cut(row, drawn.index, self._target_px, drawn.mirrored)
        except ImageFault as fault:
            return fault
        return geometry

    def inputs(self) -> Inputs:
        """See `SlotReader.inputs`."""
        parts = [self._pixels[slot] for slot in range(len(self._batch))]
        return map_tensors(lambda *tensors: torch.stack(tensors), *parts)


class CacheSlotReader:
    """Fills a batch with the encodings of a prepared set."""

    def __init__(self, prepared: PreparedSet, batch: Sequence[Slot], target_px: Size) -> None:
        self._prepared, self._batch, self._target_px = prepared, batch, target_px
        self._encoded = prepared.room(len(batch), target_px)

    def read(self, rows: Sequence[Row], slots: Sequence[int]) -> list[Geometry | ImageFault]:
        """See `SlotReader.read`."""
        drawn = [self._batch[slot] for slot in slots]
        asked = [Asked(row, slot.mirrored, slot.text_of(row)) for row, slot in zip(rows, drawn, strict=True)]
        return self._prepared.read(asked, self._target_px, self._encoded, slots)

    def inputs(self) -> Inputs:
        """See `SlotReader.inputs`."""
        return self._encoded
