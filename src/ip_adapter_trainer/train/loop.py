"""The training loop: batches to gradients to steps, with validations and checkpoints between them.

It knows interfaces and no family, encoder, variant or layout by name. What it changes is a `TrainState`; reports, saves
and stops stand beside it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from ip_adapter_trainer.core.errors import Stopped
from ip_adapter_trainer.core.values import Batch
from ip_adapter_trainer.runtime.launch import Runtime
from ip_adapter_trainer.runtime.stopping import Stopping
from ip_adapter_trainer.train.saving import Saving
from ip_adapter_trainer.train.state import TrainState
from ip_adapter_trainer.train.step_log import StepLog
from ip_adapter_trainer.train.track import Track
from ip_adapter_trainer.train.validate import Validator

_GO_ON, _LAST, _BROKEN_OFF = range(3)  # what a process makes of a step: the greatest of all processes' counts


@dataclass
class Loop:
    """One run from its first or resumed step to its last."""

    state: TrainState  # what is trained
    loss_of: Callable[[Batch], Tensor]  # the loss of a micro batch, a scalar that reaches the adapter's parameters
    batches: Iterator[Batch]  # this process's micro batches, without end
    micro_batches: int  # of them that make its part of a step
    total_steps: int  # of the run
    images_per_step: int  # over all processes
    save_steps: int  # steps between checkpoints
    validator: Validator
    saving: Saving
    log: StepLog
    track: Track
    runtime: Runtime
    stopping: Stopping
    stopped: bool = False  # set once all processes agreed to stop

    def run(self) -> None:
        """Train to the last step, or until asked to stop; what was trained is saved either way.

        Raises:
            NotFiniteProblem: loss or gradients were not finite for five steps in a row.
            StorageProblem: the disk refused the last checkpoint.
        """
        if self.state.global_step:
            self.between_steps(resumed=True)
        while self.state.global_step < self.total_steps and not self.stopped:
            self.optimize()
            self.log.read()
            self.between_steps()
        self.log.read(everything=True)
        self.saving.save()
        self.saving.finish()

    def between_steps(self, resumed: bool = False) -> None:
        """Validate where that is due, then save the checkpoint that remembers it."""
        self.saving.check()
        step, last = self.state.global_step, self.state.global_step >= self.total_steps
        validates = self.validator.due(step, last) and self.state.validated != step
        saves = not resumed and (last or step % self.save_steps == 0)
        if validates or saves:
            self.log.read(everything=True)
        if validates and not self.validated():
            self.stopped = True
        elif saves:
            self.saving.save()

    def validated(self) -> bool:
        """Validate on the first process, for which the others wait; return whether it was not broken off to stop.

        A validation that is broken off is done again when the run is resumed, and leaves no numbers.
        """
        begun_bytes = self.track.metrics_bytes()
        try:
            self.stopping.together(self.validator.on_first(self.state, self.track, self.runtime))
        except Stopped:
            self.track.take_back(begun_bytes)
            return False
        self.state.validated = self.state.global_step
        return True

    def optimize(self) -> None:
        """Make one optimizer step over all its micro batches on all processes, unless any broke it off to stop.

        A step that was broken off is done again when the run is resumed, with the same draws.
        """
        rows = self.accumulate()
        asked = _BROKEN_OFF if rows is None else _LAST if self.stopping.asked else _GO_ON
        agreed = self.runtime.highest(asked)
        self.stopped = agreed != _GO_ON
        if rows is None or agreed == _BROKEN_OFF:
            return
        report, rate = self.state.update(self.runtime.world)
        self.track.stopwatch.trained(self.images_per_step)
        self.log.add(rows, rate, report)

    def accumulate(self) -> list[int] | None:
        """Add up the gradients of this process's micro batches; return their rows, or None if asked to stop before."""
        state, rows = self.state, list[int]()
        state.gradients.zero()
        try:
            for _ in range(self.micro_batches):
                self.stopping.poll()
                began = time.monotonic()
                batch = next(self.batches)
                self.track.stopwatch.waited(time.monotonic() - began)
                rows += batch.row.tolist()
                loss = self.loss_of(batch) / self.micro_batches
                state.scaler.scale(loss).backward()
                state.gradients.add_loss(loss.detach())
        except Stopped:
            return None
        return rows
