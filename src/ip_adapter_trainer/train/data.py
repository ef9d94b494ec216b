"""The source of batches: the rows of a manifest, read, ordered and loaded for this process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ip_adapter_trainer.cache.prepared import PreparedSet
from ip_adapter_trainer.core.errors import Problem
from ip_adapter_trainer.core.log import say
from ip_adapter_trainer.core.values import Batch
from ip_adapter_trainer.evaluate.config import ValidationConfig
from ip_adapter_trainer.feed.bucketing import assign_buckets
from ip_adapter_trainer.feed.config import DataConfig
from ip_adapter_trainer.feed.dataset import TrainingSet
from ip_adapter_trainer.feed.loader import Loader
from ip_adapter_trainer.feed.readers import Preprocess
from ip_adapter_trainer.feed.sampler import Sampler
from ip_adapter_trainer.manifest.faults import FaultLog
from ip_adapter_trainer.runtime.launch import Runtime
from ip_adapter_trainer.runtime.stopping import Poll
from ip_adapter_trainer.train.fixed import FixedRows
from ip_adapter_trainer.train.rows import RunRows, of_validation

if TYPE_CHECKING:
    from ip_adapter_trainer.model import Model

_NAMED = 5  # buckets in a message


class TrainingData:
    """The rows of a run, read, cut and put in order.

    Attributes:
        rows: number of rows that are trained on.
        images_per_step: images of one optimizer step over all processes and micro-batches.
        micro_images: images that a process takes at once.
        fingerprint: of the manifest, by which a resumed run recognises it.
        sampler: decides which rows make each step.
        seen: rows that are trained on, for validation.
        unseen: rows that are not trained on, held out or of another set; None: there are none.
    """

    def __init__(
        self,
        config: DataConfig,
        validation: ValidationConfig,
        runtime: Runtime,
        rows: RunRows,
        preprocess: Mapping[str, Preprocess],
        prepared: PreparedSet | None = None,
        *,
        seed: int,
        images_per_step: int,
    ) -> None:
        self._config, self._validation, self._runtime, self._manifest = config, validation, runtime, rows.manifest
        sizes_px = prepared.sizes_px(rows.manifest.rows) if prepared and config.aspect_ratio_buckets else None
        bucketing = assign_buckets(rows.manifest, config, sizes_px)
        trained = bucketing.only(~rows.held_out)
        self._samples = TrainingSet(rows.manifest, config, trained, seed=seed, preprocess=preprocess, prepared=prepared)
        self._early_faults = (*rows.manifest.faults, *bucketing.faults)
        self.rows, self.fingerprint = rows.trained, rows.manifest.fingerprint
        self.images_per_step, self.micro_images = images_per_step, config.micro_images
        self.sampler = Sampler(trained.bucket_of_row, seed=seed, batch_images=images_per_step)

        def fixed(held_out: NDArray[np.bool_]) -> FixedRows:
            """Return rows of the training set to look at."""
            numbers = np.flatnonzero(held_out).tolist()
            looks = validation.validation_seed
            return FixedRows(rows.manifest, numbers, config, looks, bucketing, preprocess, prepared)

        self.seen = fixed(~rows.held_out)
        self.unseen = fixed(rows.held_out) if rows.held_out.any() else None
        if rows.validation:
            other, own = rows.validation, of_validation(config, validation)
            buckets = assign_buckets(other, own)
            self.unseen = FixedRows(other, rows.looked_at, own, validation.validation_seed, buckets, preprocess)

    def batches(self, output: Path, first_step: int, poll: Poll) -> Iterator[Batch]:
        """Return this process's micro-batches from a step on, without end; `poll` is called while one is waited for.

        Faults are noted in the folder `output`.

        Raises:
            DataProblem: more rows are faulty than the settings allow.
        """
        log = FaultLog(output, self._manifest.entries, self._config.max_fault_rate)
        log.add(self._early_faults, writes=self._runtime.is_main)
        rank, world, pin = self._runtime.rank, self._runtime.world, self._runtime.device.type == "cuda"
        loader = Loader(self._samples, self.sampler, log, self.micro_images, rank=rank, world=world, pin=pin)
        return loader.from_step(first_step, poll)

    def take_at_once(self, images: int) -> None:
        """Make batches of so many images from now on, in validation too."""
        self.micro_images = images
        for rows in (self.seen, self.unseen):
            if rows:
                rows.batch_images = images

    def demand_validation(self) -> None:
        """Demand that some row of another validation set can be read, before anything is trained.

        Raises:
            Problem: none can.
        """
        if self._validation.validation_data and self.unseen and not self.unseen.batches(1):
            what = f"no row of the validation set can be read; the first: {self.unseen.problem}"
            remedy = "correct --validation_root_path, or give another set"
            raise Problem(what, where=f"--validation_data {self._validation.validation_data}", remedy=remedy)

    def encode_unseen(self, model: Model) -> None:
        """Encode the rows of another validation set, before encoders that a prepared set replaces are released."""
        if self.unseen and not self.unseen.is_encoded and self._validation.validates:
            count = max(self._validation.num_validation_images, self._validation.grid_rows)
            self.unseen.encode(count, model, self._runtime.device)

    def tell(self, steps: int) -> None:
        """Warn of images that are not trained on once in every epoch of a run of so many steps."""
        slow = self.sampler.slow_buckets()
        if not self._config.aspect_ratio_buckets or not slow:
            return
        sizes_px = self._samples.bucketing.buckets.sizes_px
        named = ", ".join("{2} of {1}x{0}".format(*sizes_px[bucket], images) for bucket, images in slow[:_NAMED])
        named += ", ..." * (len(slow) > _NAMED)
        images, never = sum(images for _, images in slow), self.sampler.never_seen(steps)
        what = f"{images:,} of {self.rows:,} images are not trained on in every epoch"
        why = f"their buckets hold fewer than the {self.images_per_step} images of a step, and wait for several epochs"
        end = f"; {never:,} images are in no step of this run" if never else ""
        remedy = "lower the images of a step, raise --bucket_step_px, or lower --bucket_max_aspect"
        say(f"WARNING: {what}: {why}{end} (width x height: {named}); {remedy}")

    def where(self, row: int) -> str:
        """Return a row's place in the manifest, for messages."""
        return self._manifest.where(row)
