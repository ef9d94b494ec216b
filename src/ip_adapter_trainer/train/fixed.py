"""The few rows that a run looks at again and again, and nothing about them drawn by chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ip_adapter_trainer.cache.prepared import PreparedSet
from ip_adapter_trainer.core.errors import DataProblem
from ip_adapter_trainer.core.log import say
from ip_adapter_trainer.core.rng import stream
from ip_adapter_trainer.core.values import Batch, Encoded, map_tensors
from ip_adapter_trainer.feed.bucketing import MAX_TRIES, Bucketing
from ip_adapter_trainer.feed.config import DataConfig
from ip_adapter_trainer.feed.dataset import TrainingSet
from ip_adapter_trainer.feed.readers import Preprocess
from ip_adapter_trainer.manifest.hold_out import one_an_image
from ip_adapter_trainer.manifest.manifest import Manifest

if TYPE_CHECKING:
    from ip_adapter_trainer.model import Model

_NO_CHANCE = {
    "random_flip": False, "center_crop": True, "prompt_flip": False, "prompt_crop_min_share": 1.0,
    "text_drop_rate": 0.0, "image_drop_rate": 0.0, "both_drop_rate": 0.0,
}  # fmt: skip


class FixedRows:
    """Rows of a manifest in an order drawn once, each with another image prompt; a row's index is its number.

    Attributes:
        batch_images: the most images of a batch.
        problem: where the first row is that could not be read, and why; empty: all could.
    """

    def __init__(
        self,
        manifest: Manifest,
        numbers: Sequence[int],
        config: DataConfig,
        seed: int,
        bucketing: Bucketing,
        preprocess: Mapping[str, Preprocess],
        prepared: PreparedSet | None = None,
    ) -> None:
        self._manifest, self._numbers, self._seed, self.batch_images = manifest, numbers, seed, config.micro_images
        plain = config.model_copy(update=_NO_CHANCE)
        self._pixels, self._samples = (  # with one try, so that no row stands in for one that cannot be read
            TrainingSet(manifest, plain, bucketing, seed=seed, preprocess=preprocess, prepared=source, max_tries=1)
            for source in (None, prepared)
        )
        self._is_prepared = prepared is not None
        self._encoded: list[Batch] = []
        self.problem = ""

    @property
    def is_encoded(self) -> bool:
        """Return whether rows come encoded, unless pixels are asked for."""
        return self._is_prepared or bool(self._encoded)

    def batches(self, count: int, *, pixels: bool = False) -> list[Batch]:
        """Read the first rows that can be read; batches hold rows of one size, at most `batch_images` of them.

        With `pixels`, the images themselves are given, even of rows that were encoded beforehand.
        """
        by_size: dict[tuple[int, int], list[Batch]] = {}
        for row in self._rows(count, pixels):
            by_size.setdefault(row.geometry[0].target_px, []).append(row)
        most = self.batch_images
        return [joined(group[i : i + most]) for group in by_size.values() for i in range(0, len(group), most)]

    def encode(self, count: int, model: Model, device: torch.device) -> None:
        """Encode the first rows now and keep them, for a run that lets its encoders go."""
        with torch.no_grad():
            self._encoded = [_encoded(row.to(device), model) for row in self._rows(count, pixels=True)]

    def _rows(self, count: int, pixels: bool) -> list[Batch]:
        """Batches of one row each."""
        if self._encoded and not pixels:
            return self._encoded[:count]
        found: list[Batch] = []
        drawn = stream(self._seed, "validation-rows").permutation(self._numbers).tolist()
        for tried, number in enumerate(one_an_image(self._manifest.rows, drawn, self._manifest.root)):
            if len(found) == count or tried - len(found) > MAX_TRIES:
                break
            try:
                found.append((self._pixels if pixels else self._samples).batch([(number, number)]))
            except DataProblem as problem:
                if not self.problem:  # training tells of its own
                    self.problem = f"{problem.fault.where}: {problem.fault.what}"
                    say(f"rows that cannot be read are not looked at; the first: {self.problem}")
        return found


def joined(rows: Sequence[Batch]) -> Batch:
    """Return one batch of several, all of one size."""
    return Batch(
        index=torch.cat([row.index for row in rows]),
        row=torch.cat([row.row for row in rows]),
        inputs=map_tensors(lambda *parts: torch.cat(parts), *(row.inputs for row in rows)),
        text=tuple(text for row in rows for text in row.text),
        geometry=tuple(geometry for row in rows for geometry in row.geometry),
        drop_text=torch.cat([row.drop_text for row in rows]),
        drop_image=torch.cat([row.drop_image for row in rows]),
    )


def _encoded(row: Batch, model: Model) -> Batch:
    """A batch with all that the frozen encoders say of it, on the host."""
    inputs = Encoded(
        model.moments_of(row.inputs).cpu(),
        {need: feature.cpu() for need, feature in model.features_of(row.inputs).items()},
        {name: tensor.cpu() for name, tensor in model.codec.text(row.text).items()},
    )
    return replace(row, inputs=inputs)
