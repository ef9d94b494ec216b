"""Our side: the package's own model, step and training loop, on rows that were encoded once."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.pictures import Files
from benchmarks.sizes import SEED, Nets, Size, model_of
from ip_adapter_trainer.cache.prepared import PreparedSet
from ip_adapter_trainer.cache.spec import CacheSpec
from ip_adapter_trainer.config import compose
from ip_adapter_trainer.core.values import Batch, Encoded
from ip_adapter_trainer.diffusion import NoiseProcess, ObjectiveConfig
from ip_adapter_trainer.loading.config import part_of
from ip_adapter_trainer.manifest.fingerprint import Digest
from ip_adapter_trainer.manifest.images import ImageFiles
from ip_adapter_trainer.manifest.manifest import read_manifest
from ip_adapter_trainer.prepare.run import Job
from ip_adapter_trainer.prepare.spec import cache_spec
from ip_adapter_trainer.runtime.launch import Runtime, start
from ip_adapter_trainer.runtime.precision import dtype_of
from ip_adapter_trainer.runtime.signals import StopSignal
from ip_adapter_trainer.runtime.stopping import Poll, Stopping, no_poll
from ip_adapter_trainer.storage.checkpoints import all_checkpoints
from ip_adapter_trainer.train.build import make_loop
from ip_adapter_trainer.train.config import LeanConfig, TrainConfig
from ip_adapter_trainer.train.data import TrainingData
from ip_adapter_trainer.train.fit import Fit
from ip_adapter_trainer.train.guard import RunIdentity
from ip_adapter_trainer.train.lean import lean
from ip_adapter_trainer.train.loop import Loop
from ip_adapter_trainer.train.optim import make_optimizer
from ip_adapter_trainer.train.record import RunRecord
from ip_adapter_trainer.train.rows import RunRows
from ip_adapter_trainer.train.run import run_loop
from ip_adapter_trainer.train.run_plan import make_plan
from ip_adapter_trainer.train.state import TrainState
from ip_adapter_trainer.train.step import Step

Settings = dict[str, Any]

# Without lean layers or channels-last weights there are no products either, so neither side of those has them.
_NO_PRODUCTS: Settings = {"product_convolutions": False}
# Settings of our step without a technique and with it. A compiled step stands in place of the lean layers.
TECHNIQUES: dict[str, tuple[Settings, Settings]] = {
    "lean_layers": (_NO_PRODUCTS | {"lean_layers": False}, _NO_PRODUCTS),
    "product_convolutions": (_NO_PRODUCTS, {}),
    "channels_last": (_NO_PRODUCTS | {"channels_last": "off"}, _NO_PRODUCTS),
    "fused_optimizer": ({"fused_optimizer": False}, {}),
    "prepare_text": ({}, {"prepare_text": True}),
    "checkpointing": ({}, {"gradient_checkpointing": True}),
    "reduce-overhead": ({}, {"compile": "reduce-overhead"}),
    "compile": ({}, {"compile": "on"}),
}
_ENDLESS = 10**9  # steps: a run ends when its batches do


class Rows:
    """Batches for a run's loop in place of those of a manifest."""

    fingerprint = Digest().fingerprint()

    def __init__(self, batches: Iterator[Batch], images: int) -> None:
        self._batches, self.rows, self.images_per_step, self.micro_images = batches, images, images, images

    def batches(self, output: Path, first_step: int, poll: Poll) -> Iterator[Batch]:
        """The given batches."""
        return self._batches

    def where(self, row: int) -> str:
        """Rows of a benchmark stand nowhere."""
        return f"row {row}"


class OurStep:
    """The package's model with frozen weights in a precision, and the step over it.

    Args:
        size: the models' sizes.
        nets: their frozen parts.
        weights: the projector's first weights.
        precision: no, fp16 or bf16, as `--mixed_precision`.
        device: where everything is.
        settings: of the run, where they are not the defaults.

    Attributes:
        loop: of the run that is going on.
        saves: the step under way is followed by a checkpoint.
    """

    loop: Loop
    saves = False

    def __init__(
        self, size: Size, nets: Nets, weights: dict[str, Tensor], precision: str, device: torch.device,
        settings: Settings | None = None,
    ) -> None:  # fmt: skip
        self.config_class, self.settings = compose("base", size.family), settings or {}
        self.precision, self.device, self.size = precision, device, size
        dtype = dtype_of(precision)
        nets.pipeline.to(dtype=dtype)
        nets.image_encoder.to(dtype)
        with torch.device(device):
            self.model = model_of(size, nets)
        self.model.adapter.image_proj_model.load_state_dict(weights)
        if self.settings.get("gradient_checkpointing"):
            self.model.checkpoint_activations()
        process = NoiseProcess(nets.pipeline.scheduler, ObjectiveConfig(timestep_density="uniform"))
        self.loss = Step(self.model, process, SEED, device)
        self._made: CacheSpec | None = None

    def encode(self, batch: Batch) -> Encoded:
        """What preparing a set makes of a batch, once for all steps."""
        keeps_text = self.settings.get("prepare_text")
        text = self.model.codec.text(batch.text) if keeps_text else {}
        return Encoded(self.model.moments_of(batch.inputs), self.model.features_of(batch.inputs), text)

    def release_encoders(self) -> None:
        """Lets go of what a prepared set makes needless."""
        self.model.release_encoders(texts=self.settings.get("prepare_text", False))

    def gradients(self, batch: Batch) -> dict[str, Tensor]:
        """Gradients of the trained weights for a batch, by published training key; nothing is stepped."""
        with self.model.attached(), lean(self.model, part_of(self.config(Path("none")), LeanConfig)):
            self.loss(batch).backward()
        found = {name: p.grad.float() for name, p in self.model.adapter.named_parameters() if p.grad is not None}
        self.model.adapter.zero_grad()
        return found

    def try_step(self, batch: Batch) -> None:
        """A whole step, to see whether it fits: the moments are let go of, the weights stay what they were."""
        still = self.config(Path("none")).model_copy(update={"learning_rate": 0.0})
        optimizer = make_optimizer(self.model.adapter, still)
        with self.model.attached(), lean(self.model, part_of(still, LeanConfig)):
            self.loss(batch).backward()
            optimizer.step()
        self.model.adapter.zero_grad()

    def config(self, output: Path, images: int = 1, **more: Any) -> TrainConfig:
        """Settings of a run, which has neither validation nor tracker."""
        given: Settings = {
            "pretrained_model_name_or_path": "random weights", "image_encoder_path": "random weights",
            "data_json_file": "none", "output_dir": str(output), "report_to": "none", "num_validation_images": 0,
            "grid_rows": 0, "seed": SEED, "prepared_dir": "none", "mixed_precision": self.precision,
            "train_batch_size": images, "max_train_steps": _ENDLESS,
        }  # fmt: skip
        return self.config_class(**given | self.settings | more)

    @cached_property
    def runtime(self) -> Runtime:
        """This process, alone."""
        return start(mixed_precision=self.precision, local_rank=-1, output_dir="", logging_dir="")

    def _spec(self, files: Files) -> CacheSpec:
        """What a set of the pictures holds; made once, for it hashes the encoders, which are let go of later."""
        if self._made is None:
            config, model = self.config(Path("none"), **files.settings), self.model
            self._made = cache_spec(config, model.codec, model.encoders, model.variant.needs, text=False)
        return self._made

    def preparation(self, files: Files, folder: Path) -> Job:
        """`ip-adapter prepare` of some pictures, ready to run."""
        config = self.config(folder, **files.settings)
        return Job(config, self.runtime, read_manifest(config), self._spec(files), folder)

    def prepare(self, job: Job) -> None:
        """Reads, encodes and writes."""
        images = self.config(Path("none")).encode_batch_size
        with StopSignal() as signal:
            job.run(self.model.codec, self.model.encoders, images, Stopping(signal, self.runtime))

    def prepared_batches(self, files: Files, folder: Path, images: int, output: Path) -> Iterator[Batch]:
        """Batches as a run reads them from the set that `prepare` left in a folder, with the default data workers."""
        config = self.config(output, images, data_json_file=str(files.manifest), resolution=files.side_px)
        manifest = read_manifest(config)
        prepared = PreparedSet(folder, self._spec(files), ImageFiles.of(manifest.root, config))
        rows = RunRows(manifest, np.zeros(len(manifest.rows), np.bool_))
        preprocess = {role: encoder.preprocess for role, encoder in self.model.encoders.items()}
        data = TrainingData(config, config, self.runtime, rows, preprocess, prepared, seed=SEED, images_per_step=images)
        return data.batches(output, 0, no_poll)

    def run(self, batches: Iterator[Batch], images: int, output: Path) -> Path:
        """The whole training loop until there are no more batches, and one step after; returns its last checkpoint."""
        config = self.config(output, images)
        output.mkdir(parents=True, exist_ok=True)
        rows: Any = Rows(self._ended(batches), images)
        plan = make_plan(self.model, config, images, images)
        identity = RunIdentity(rows.fingerprint, rows.where, {}, images, world=1)
        record = RunRecord(config, self.model, plan, identity, Fit(images))
        state = TrainState(self.model.adapter, config, plan, self.runtime)
        with StopSignal() as signal:
            self.loop = make_loop(record, state, rows, self.loss, self.runtime, Stopping(signal, self.runtime))
            run_loop(self.loop, self.loss, part_of(config, LeanConfig))
        return all_checkpoints(output)[-1]

    def _ended(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        for batch in batches:
            self.loop.save_steps = self.loop.state.global_step + 1 if self.saves else _ENDLESS
            yield batch
        self.loop.total_steps = self.loop.state.global_step + 1
        yield batch

    @property
    def is_writing(self) -> bool:
        """Whether a checkpoint is on its way to the disk."""
        under_way = self.loop.saving.saver._under_way
        return under_way is not None and not under_way.done()
