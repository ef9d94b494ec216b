"""The source of batches: the rows of a manifest, read, ordered and loaded for this process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ip_adapter_trainer.cache.prepared import PreparedSet
from ip_adapter_trainer.core.errors import Problem
from ip_adapter_trainer.core.log import say
from ip_adapter_trainer.core.values import Batch
from ip_adapter_trainer.feed.bucketing import Bucketing, assign_buckets
from ip_adapter_trainer.feed.dataset import TrainingSet
from ip_adapter_trainer.feed.loader import Loader
from ip_adapter_trainer.feed.readers import Preprocess
from ip_adapter_trainer.feed.sampler import Sampler
from ip_adapter_trainer.manifest.faults import FaultLog
from ip_adapter_trainer.runtime.launch import Runtime
from ip_adapter_trainer.runtime.stopping import Poll
from ip_adapter_trainer.train.config import TrainConfig
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
        fingerprint: of the manifest, by which a resumed run recognises it.
        sampler: decides which rows make each step.
        seen: rows that are trained on, for validation.
        unseen: rows that are not trained on, held out or of another set; None: there are none.
    """

    def __init__(
        self,
        config: TrainConfig,
        runtime: Runtime,
        rows: RunRows,
        preprocess: Mapping[str, Preprocess],
        prepared: PreparedSet | None = None,
    ) -> None:
        self._config, self._runtime, self._manifest, self._prepared = config, runtime, rows.manifest, prepared
        sizes_px = prepared.sizes_px(rows.manifest.rows) if prepared and config.aspect_ratio_buckets else None
        bucketing = assign_buckets(rows.manifest, config, sizes_px)
        trained = bucketing.only(~rows.held_out)
        self._samples = TrainingSet(
            rows.manifest, config, trained, seed=config.seed, preprocess=preprocess, prepared=prepared
        )
        self._early_faults = (*rows.manifest.faults, *bucketing.faults)
        self.rows, self.fingerprint = rows.trained, rows.manifest.fingerprint
        self.images_per_step = config.images_per_step(runtime.world)
        self.sampler = Sampler(trained.bucket_of_row, seed=config.seed, batch_images=self.images_per_step)
        self.seen = FixedRows(
            rows.manifest, np.flatnonzero(~rows.held_out).tolist(), config, bucketing, preprocess, prepared
        )
        self.unseen = self._unseen(rows, bucketing, preprocess)

    def _unseen(self, rows: RunRows, bucketing: Bucketing, preprocess: Mapping[str, Preprocess]) -> FixedRows | None:
        if rows.validation:
            config = of_validation(self._config)
            return FixedRows(
                rows.validation, rows.looked_at, config, assign_buckets(rows.validation, config), preprocess
            )
        numbers = np.flatnonzero(rows.held_out).tolist()
        return (
            FixedRows(rows.manifest, numbers, self._config, bucketing, preprocess, self._prepared) if numbers else None
        )

    def batches(self, first_step: int, poll: Poll) -> Iterator[Batch]:
        """Return this process's micro-batches from a step on, without end; `poll` is called while one is waited for.

        Raises:
            DataProblem: more rows are faulty than the settings allow.
        """
        log = FaultLog(Path(self._config.output_dir), self._manifest.entries, self._config.max_fault_rate)
        log.add(self._early_faults, writes=self._runtime.is_main)
        rank, world, pin = self._runtime.rank, self._runtime.world, self._runtime.device.type == "cuda"
        return Loader(self._samples, self.sampler, log, rank=rank, world=world, pin=pin).from_step(first_step, poll)

    def demand_validation(self) -> None:
        """Demand that some row of another validation set can be read, before anything is trained.

        Raises:
            Problem: none can.
        """
        if self._config.validation_data and self.unseen and not self.unseen.batches(1):
            what = f"no row of the validation set can be read; the first: {self.unseen.problem}"
            remedy = "correct --validation_root_path, or give another set"
            raise Problem(what, where=f"--validation_data {self._config.validation_data}", remedy=remedy)

    def encode_unseen(self, model: Model) -> None:
        """Encode the rows of another validation set, before encoders that a prepared set replaces are released."""
        config = self._config
        if self.unseen and not self.unseen.is_encoded and config.validates:
            count = max(config.num_validation_images, config.grid_rows)
            self.unseen.encode(count, model, self._runtime.device)

    def tell(self, steps: int) -> None:
        """Warn of images that are not trained on once in every epoch of a run of so many steps."""
        slow = self.sampler.slow_buckets()
        if not self._config.aspect_ratio_buckets or not slow:
            return
        sizes = [
            (images, "{1}x{0}".format(*self._samples.bucketing.buckets.sizes_px[bucket])) for bucket, images in slow
        ]
        named = ", ".join(f"{images} of {size}" for images, size in sizes[:_NAMED]) + ", ..." * (len(sizes) > _NAMED)
        images, never = sum(images for _, images in slow), self.sampler.never_seen(steps)
        what = f"{images:,} of {self.rows:,} images are not trained on in every epoch"
        why = f"their buckets hold fewer than the {self.images_per_step} images of a step, and wait for several epochs"
        end = f"; {never:,} images are in no step of this run" if never else ""
        remedy = "lower the images of a step, raise --bucket_step_px, or lower --bucket_max_aspect"
        say(f"WARNING: {what}: {why}{end} (width x height: {named}); {remedy}")

    def where(self, row: int) -> str:
        """Return a row's place in the manifest, for messages."""
        return self._manifest.where(row)
