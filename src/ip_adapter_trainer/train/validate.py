"""Validation inside a run: losses on fixed rows under three image conditions, and a picture grid."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ip_adapter_trainer.core.errors import DataProblem
from ip_adapter_trainer.core.log import say
from ip_adapter_trainer.core.staging import staged_file
from ip_adapter_trainer.core.stopping import Poll
from ip_adapter_trainer.core.storage import reason_of
from ip_adapter_trainer.core.types import Batch, Encoded
from ip_adapter_trainer.evaluate.grid import validation_grid
from ip_adapter_trainer.evaluate.losses import validation_losses
from ip_adapter_trainer.model import Model
from ip_adapter_trainer.train.config import TrainConfig
from ip_adapter_trainer.train.source import Source
from ip_adapter_trainer.train.step import Step
from ip_adapter_trainer.train.track import Track


class Validator:
    """Answers at intervals whether the adapter is learning to use the picture."""

    def __init__(self, config: TrainConfig, model: Model, source: Source, step: Step) -> None:
        self.config, self.model, self.source, self.step = config, model, source, step

    def due(self, done: int, last: bool) -> bool:
        """Whether a validation belongs after `done` steps."""
        every = self.config.validation_steps
        return last or (every is not None and done > 0 and done % every == 0)

    def __call__(self, done: int, output: Path, track: Track, poll: Poll) -> None:
        """Measures, draws, writes and reports; raises what `poll` raises."""
        config, seed, device = self.config, self.config.validation_seed, self.step.device
        if config.num_validation_images:
            batches = [batch.to(device) for batch in self.source.fixed(config.num_validation_images, seed)]
            report = validation_losses(self.model, self.step.process, batches, seed, poll)
            track.event(done, report.as_metrics())
            say(f"step {done}: {report.summary()}")
        if config.grid_rows:
            self._draw(done, output, track, poll)

    def _draw(self, done: int, output: Path, track: Track, poll: Poll) -> None:
        """The grid shows the pictures themselves; a prepared set may have come without them."""
        config, device = self.config, self.step.device
        try:
            batches = self.source.fixed(config.grid_rows, config.validation_seed, pixels=True)
            features = self._features(batches) if self.source.is_prepared else None
        except DataProblem as problem:
            say(f"step {done}: no grid, the pictures cannot be read ({problem.where}: {problem.what})")
            return
        picture = validation_grid(self.model, [batch.to(device) for batch in batches], config, poll, features)
        file = output / "grids" / f"step-{done:07d}.png"
        track.picture(done, "validation/grid", picture)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with staged_file(file) as stage:
                picture.save(stage)
        except OSError as error:
            say(f"step {done}: the grid was not saved: {reason_of(error)}")
        else:
            say(f"step {done}: grid {file}")

    def _features(self, batches: list[Batch]) -> Tensor:
        """What a prepared set holds of the same rows [R, ...].

        Raises:
            DataProblem: some row is served from another picture than it shows now.
        """
        config = self.config
        encoded = self.source.fixed(config.grid_rows, config.validation_seed)
        shown = [row for batch in batches for row in batch.row.tolist()]
        if shown != [row for batch in encoded for row in batch.row.tolist()]:
            what, where = "some are not those that were prepared", str(config.prepared_dir or "the prepared set")
            raise DataProblem(what, where=where, remedy="run `ip-adapter prepare` again")
        pictures = [batch.to(self.step.device).picture for batch in encoded]
        return torch.cat([picture.features for picture in pictures if isinstance(picture, Encoded)])
