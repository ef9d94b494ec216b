"""Our side: the package's own model, step and training loop, on rows that were encoded once."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.sizes import SEED, Nets, Size
from ip_adapter_trainer.adapters import VARIANTS
from ip_adapter_trainer.config import compose
from ip_adapter_trainer.core.launch import start
from ip_adapter_trainer.core.precision import dtype_of
from ip_adapter_trainer.core.signals import StopSignal
from ip_adapter_trainer.core.stopping import Stopping
from ip_adapter_trainer.core.types import Batch, Encoded
from ip_adapter_trainer.data.fingerprint import Digest
from ip_adapter_trainer.diffusion import NoiseProcess, ObjectiveConfig
from ip_adapter_trainer.encoders import ClipImageEncoder
from ip_adapter_trainer.families import FAMILIES
from ip_adapter_trainer.families._unet import lay_out_autoencoder
from ip_adapter_trainer.model import Model
from ip_adapter_trainer.train.config import LeanConfig
from ip_adapter_trainer.train.lean import lean
from ip_adapter_trainer.train.loop import Trainer
from ip_adapter_trainer.train.plan import make_plan
from ip_adapter_trainer.train.step import Step
from ip_adapter_trainer.train.track import Track

# Settings that turn a technique the other way than the defaults do; each is measured against a run with the defaults.
TECHNIQUES: dict[str, dict[str, Any]] = {
    "lean_layers": {"lean_layers": False},
    "product_convolutions": {"product_convolutions": False},
    "lean_attention": {"lean_attention": False},
    "channels_last": {"channels_last": "off"},
    "prepare_text": {"prepare_text": True},
    "checkpointing": {"gradient_checkpointing": True},
    "compile": {"compile": "on"},
}
ON_BY_DEFAULT = frozenset(("lean_layers", "product_convolutions", "lean_attention", "channels_last"))


class Rows:
    """Batches for a `Trainer` in place of those of a manifest."""

    fingerprint = Digest().fingerprint()

    def __init__(self, batches: Iterator[Batch], images: int) -> None:
        self._batches, self.rows, self.images_per_step = batches, images, images

    def batches(self, first_step: int) -> Iterator[Batch]:
        """The given batches."""
        return self._batches

    def where(self, row: int) -> str:
        """Rows of a benchmark stand nowhere."""
        return f"row {row}"

    def fixed(self, count: int, seed: int) -> list[Batch]:
        """No validation rows: validation is no part of a step."""
        return []


class TimedTrainer(Trainer):
    """The training loop, with a watch on its saves."""

    save_s = 0.0

    def save(self, track: Track) -> None:
        """See `Trainer.save`."""
        began = time.perf_counter()
        super().save(track)
        self.save_s = max(self.save_s, time.perf_counter() - began)  # a second call finds nothing to save


class OurStep:
    """The package's model with frozen weights in a precision, and the step over it.

    Args:
        size: the models' sizes.
        nets: their frozen parts.
        weights: the projector's first weights.
        precision: no, fp16 or bf16, as `--mixed_precision`.
        device: where everything is.
        techniques: names out of `TECHNIQUES`, which are turned the other way.
    """

    def __init__(
        self, size: Size, nets: Nets, weights: dict[str, Tensor], precision: str, device: torch.device,
        techniques: tuple[str, ...] = (),
    ) -> None:  # fmt: skip
        self.config_class = compose("base", size.family)
        self.settings: dict[str, Any] = {}
        for name in techniques:
            self.settings |= TECHNIQUES[name]
        self.precision, self.device, self.size = precision, device, size
        dtype = dtype_of(precision)
        nets.pipeline.to(dtype=dtype)
        lay_out_autoencoder(nets.pipeline.vae)
        entry: Any = FAMILIES[size.family]
        encoder = ClipImageEncoder(nets.image_encoder.to(dtype), "random weights")
        with torch.device(device):
            self.model = Model(entry(nets.pipeline), encoder, VARIANTS["base"], VARIANTS["base"].Config())
        self.model.adapter.image_proj_model.load_state_dict(weights)
        if self.settings.get("gradient_checkpointing"):
            self.model.checkpoint_activations()
        process = NoiseProcess(nets.pipeline.scheduler.config, ObjectiveConfig(timestep_density="uniform"))
        self.loss = Step(self.model, process, SEED, device)

    def encode(self, batch: Batch) -> Encoded:
        """What preparing a set makes of a batch, once for all steps."""
        keeps_text = self.settings.get("prepare_text")
        text = self.model.family.encode_captions(batch.text) if keeps_text else {}
        return Encoded(self.model.moments_of(batch.picture), self.model.features_of(batch.picture), text)

    def release_encoders(self) -> None:
        """Lets go of what a prepared set makes needless, and of the VAE's other half, which only grids need."""
        self.model.release_encoders(texts=False)
        self.model.family.pipeline.vae.decoder = None

    def gradients(self, batch: Batch) -> dict[str, Tensor]:
        """Gradients of the trained weights for a batch, by published training key; nothing is stepped."""
        chosen = {name: value for name, value in self.settings.items() if name in LeanConfig.model_fields}
        with self.model.attached(), lean(self.model, LeanConfig(**chosen)):
            self.loss(batch).backward()
        found = {name: p.grad.float() for name, p in self.model.adapter.named_parameters() if p.grad is not None}
        self.model.adapter.zero_grad()
        return found

    def run(self, batches: Iterator[Batch], images: int, steps: int, output: Path) -> float:
        """The whole training loop; returns what its checkpoint after the last step took, in seconds."""
        config = self.config_class(
            pretrained_model_name_or_path="random weights", image_encoder_path="random weights", data_json_file="none",
            output_dir=str(output), report_to="none", num_validation_images=0, grid_rows=0, seed=SEED,
            prepared_dir="none", mixed_precision=self.precision, train_batch_size=images, max_train_steps=steps,
            **self.settings,
        )  # fmt: skip
        output.mkdir(parents=True, exist_ok=True)
        runtime = start(
            mixed_precision=self.precision, local_rank=-1, report_to="none", output_dir=str(output), logging_dir="logs"
        )
        rows: Any = Rows(batches, images)
        plan = make_plan(self.model, config, images, images)
        trainer = TimedTrainer(config, runtime, self.model, rows, self.loss, plan, marks={})
        with StopSignal() as signal:
            trainer.run(Stopping(signal, runtime))
        return trainer.save_s
