"""Validation inside a run: losses on fixed rows under three image conditions, and a picture grid."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ip_adapter_trainer.core.log import say
from ip_adapter_trainer.core.values import Batch
from ip_adapter_trainer.evaluate.config import ValidationConfig
from ip_adapter_trainer.evaluate.grid import validation_grid
from ip_adapter_trainer.evaluate.losses import ValidationReport, validation_losses
from ip_adapter_trainer.model import Model
from ip_adapter_trainer.runtime.stopping import Poll
from ip_adapter_trainer.storage.disk import reason_of
from ip_adapter_trainer.storage.staging import staged_file
from ip_adapter_trainer.train.data import TrainingData
from ip_adapter_trainer.train.fixed import FixedRows
from ip_adapter_trainer.train.step import Step
from ip_adapter_trainer.train.track import Track

if TYPE_CHECKING:
    from ip_adapter_trainer.runtime.launch import Runtime
    from ip_adapter_trainer.train.state import TrainState


class Validator:
    """Answers at intervals whether the adapter is learning to use the picture."""

    def __init__(self, config: ValidationConfig, output: Path, model: Model, data: TrainingData, step: Step) -> None:
        self.config, self.output, self.model, self.data, self.step = config, output, model, data, step

    def due(self, global_step: int, last: bool) -> bool:
        """Return whether a validation belongs after `global_step` steps."""
        every = self.config.validation_steps
        return last or (every is not None and global_step > 0 and global_step % every == 0)

    def on_first(self, state: TrainState, track: Track, runtime: Runtime) -> Callable[[Poll], None]:
        """Return the work of each process: the first validates the weights as they would be published."""

        def work(poll: Poll) -> None:
            """Validate, or leave it to the first."""
            if runtime.is_main:
                with state.published_weights():
                    self(state.global_step, track, poll)

        return work

    def __call__(self, global_step: int, track: Track, poll: Poll) -> None:
        """Measure, draw, write and report; raise what `poll` raises."""
        if self.config.num_validation_images:
            self._measure(global_step, track, poll)
        if self.config.grid_rows:
            self._draw(global_step, track, poll)

    def _measure(self, global_step: int, track: Track, poll: Poll) -> None:
        """Beside each other: rows that nothing was trained on, and rows that were."""
        unseen = self._report(self.data.unseen, poll) if self.data.unseen else None
        seen = self._report(self.data.seen, poll)
        metrics: dict[str, float] = {}
        for report, prefix, rows in ((unseen, "validation", self._kind), (seen, "training_rows", "rows trained on")):
            if report:
                metrics |= report.as_metrics(prefix)
                say(f"step {global_step}: {report.summary(rows)}")
        if self.data.unseen and not unseen:
            say(f"step {global_step}: none of the {self._kind} can be read")
        if unseen and seen and seen.overfits(unseen):
            remedy = "add images, stop earlier, or lower --learning_rate"
            what = f"over-fitting: the image helps rows trained on far more than {self._kind}"
            say(f"step {global_step}: {what}; {remedy}")
        if metrics:
            track.event(global_step, metrics)

    @property
    def _kind(self) -> str:
        return "rows of --validation_data" if self.config.validation_data else "held-out rows"

    def _report(self, rows: FixedRows, poll: Poll) -> ValidationReport | None:
        """The losses on the first of some rows; None: not one of them can be read."""
        batches = [batch.to(self.step.device) for batch in rows.batches(self.config.num_validation_images)]
        if not batches:
            return None
        return validation_losses(self.model, self.step.process, batches, self.config.validation_seed, poll)

    def _draw(self, global_step: int, track: Track, poll: Poll) -> None:
        """The grid shows the pictures themselves; a prepared set may have come without them."""
        config, rows = self.config, self.data.unseen or self.data.seen
        batches = rows.batches(config.grid_rows, pixels=True)
        encoded = rows.batches(config.grid_rows) if rows.is_encoded else []
        if not batches or (encoded and _numbers(batches) != _numbers(encoded)):
            say(f"step {global_step}: no grid, its images cannot be read, or are not those that were prepared")
            return
        parts = [self.model.features_of(batch.to(self.step.device).inputs) for batch in encoded]
        features = {need: torch.cat([part[need] for part in parts]) for need in parts[0]} if parts else None
        grid = validation_grid(self.model, [batch.to(self.step.device) for batch in batches], config, poll, features)
        file = self.output / "grids" / f"step-{global_step:07d}.png"
        track.image(global_step, "validation/grid", grid)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with staged_file(file) as stage:
                grid.save(stage)
        except OSError as error:
            say(f"step {global_step}: the grid was not saved: {reason_of(error)}")
        else:
            say(f"step {global_step}: grid {file}")


def _numbers(batches: list[Batch]) -> list[int]:
    return [row for batch in batches for row in batch.row.tolist()]
