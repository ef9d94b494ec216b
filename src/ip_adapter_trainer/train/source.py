"""Where batches come from: the rows of a manifest, read, ordered and loaded for this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from ip_adapter_trainer.core.launch import Runtime
from ip_adapter_trainer.core.rng import stream
from ip_adapter_trainer.core.stopping import Poll
from ip_adapter_trainer.core.types import Batch
from ip_adapter_trainer.data.dataset import TrainingSet
from ip_adapter_trainer.data.faults import FaultLog
from ip_adapter_trainer.data.layout import lay_out
from ip_adapter_trainer.data.loader import Loader
from ip_adapter_trainer.data.manifest import Manifest
from ip_adapter_trainer.data.order import Order
from ip_adapter_trainer.data.prepared import PreparedSet
from ip_adapter_trainer.train.config import TrainConfig

if TYPE_CHECKING:
    from PIL.Image import Image


_NO_CHANCE = {
    "random_flip": False, "center_crop": True, "prompt_flip": False, "prompt_crop_min_share": 1.0,
    "text_drop_rate": 0.0, "image_drop_rate": 0.0, "both_drop_rate": 0.0,
}  # fmt: skip


class Source:
    """The training rows of a run.

    Attributes:
        rows: usable rows.
        images_per_step: images of one optimizer step over all processes and micro batches.
        fingerprint: of the rows, by which a resumed run knows them again.
    """

    def __init__(
        self,
        config: TrainConfig,
        runtime: Runtime,
        manifest: Manifest,
        preprocess: Callable[[Image], Tensor],
        prepared: PreparedSet | None = None,
    ) -> None:
        self._config, self._runtime, self._manifest = config, runtime, manifest
        sizes_px = prepared.sizes_px(manifest.rows) if prepared and config.aspect_ratio_buckets else None
        layout = lay_out(manifest, config, sizes_px)
        self._samples = TrainingSet(
            manifest, config, layout, seed=config.seed, preprocess=preprocess, prepared=prepared
        )
        self._early_faults = (*manifest.faults, *layout.faults)
        self.rows, self.fingerprint = len(manifest.rows), manifest.fingerprint
        self.images_per_step = config.images_per_step(runtime.world)
        self._order = Order(layout.bucket_of_row, seed=config.seed, batch_images=self.images_per_step)

    def batches(self, first_step: int, poll: Poll) -> Iterator[Batch]:
        """This process's micro batches from a step on, without end; `poll` is called while one is waited for.

        Raises:
            DataProblem: more rows are faulty than the settings allow.
        """
        log = FaultLog(Path(self._config.output_dir), self._manifest.entries, self._config.max_fault_rate)
        log.add(self._early_faults, writes=self._runtime.is_main)
        rank, world, pin = self._runtime.rank, self._runtime.world, self._runtime.device.type == "cuda"
        return Loader(self._samples, self._order, log, rank=rank, world=world, pin=pin).from_step(first_step, poll)

    @property
    def is_prepared(self) -> bool:
        """Whether rows come encoded."""
        return self._samples.prepared is not None

    def where(self, row: int) -> str:
        """Where a row stands in the manifest, for people."""
        return self._manifest.where(row)

    def fixed(self, count: int, seed: int, *, pixels: bool = False) -> list[Batch]:
        """The same few rows at every validation, nothing drawn by chance; a row's index is its number.

        Batches hold rows of one size, at most `train_batch_size` of them; with `pixels`, the pictures themselves even
        where the run has a prepared set.

        Raises:
            DataProblem: pictures that cannot be read, nor those after them.
        """
        rows = stream(seed, "validation-rows").permutation(self.rows)[:count].tolist()
        plain = self._config.model_copy(update=_NO_CHANCE)
        layout, preprocess = self._samples.layout, self._samples.preprocess
        prepared = None if pixels else self._samples.prepared
        samples = TrainingSet(self._manifest, plain, layout, seed=seed, preprocess=preprocess, prepared=prepared)
        by_size: dict[tuple[int, int], list[int]] = {}
        for row in rows:
            by_size.setdefault(layout.size_px(row), []).append(row)
        most = self._config.train_batch_size
        parts = [group[i : i + most] for group in by_size.values() for i in range(0, len(group), most)]
        return [samples.batch([(row, row) for row in part]) for part in parts]
