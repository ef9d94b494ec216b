"""The numbers of steps as they come back from the device: written down, and judged."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ip_adapter_trainer.core.errors import NotFiniteProblem
from ip_adapter_trainer.core.log import say
from ip_adapter_trainer.train.step_metrics import PendingMetrics, StepMetrics

if TYPE_CHECKING:
    from torch import Tensor

    from ip_adapter_trainer.runtime.launch import Runtime
    from ip_adapter_trainer.train.state import TrainState
    from ip_adapter_trainer.train.track import Track

MAX_BAD_STEPS = 5  # in a row; then something is wrong that waiting will not mend


class StepLog:
    """Reports every step once its numbers have come, names the rows of odd ones, and stops a run that is not finite.

    The state counts bad steps and knows the usual loss; `where` tells a row's place in its manifest, by its number.
    """

    def __init__(
        self, state: TrainState, track: Track, runtime: Runtime, where: Callable[[int], str], every: int
    ) -> None:
        self._state, self._track, self._runtime, self._where, self._every = state, track, runtime, where, every
        self._pending = PendingMetrics(runtime.device)

    def add(self, rows: list[int], rate: float, values: Tensor) -> None:
        """Take the numbers [3] of the step that was just made, see `PendingMetrics.add`."""
        self._pending.add(self._state.global_step, rows, rate, values)

    def read(self, *, everything: bool = False) -> None:
        """Report and judge the steps whose numbers have come; on a GPU the last may stay unread for now.

        Raises:
            NotFiniteProblem: five steps in a row were not finite.
        """
        for metrics in self._pending.read(0 if everything else self._pending.late):
            self._write(metrics)
            if not metrics.is_finite:
                self._note_skipped(metrics)
                continue
            self._state.bad_steps = 0
            if (times := self._state.spikes.excess(metrics.loss)) is not None:
                named = self._named(metrics)
                say(f"step {metrics.step}: loss {metrics.loss:.4g}, {times:.3g} times the usual; its rows: {named}")

    def write_pending(self) -> None:
        """Write down all that has come or is still to come, unjudged."""
        for metrics in self._pending.read(keep=0):
            self._write(metrics)
        self._track.flush()

    def _write(self, metrics: StepMetrics) -> None:
        self._track.step(metrics.step, {"loss": metrics.loss, "lr": metrics.rate, "grad_norm": metrics.norm})
        if metrics.step % self._every == 0:
            self._track.flush()

    def _named(self, metrics: StepMetrics) -> str:
        """The rows of a step, on all processes."""
        return "; ".join(self._where(row) for rows in self._runtime.gathered(metrics.rows) for row in rows)

    def _note_skipped(self, metrics: StepMetrics) -> None:
        state = self._state
        state.bad_steps += 1
        named = self._named(metrics)
        say(f"step {metrics.step}: not finite, step skipped ({state.bad_steps} in a row); its rows: {named}")
        if state.bad_steps >= MAX_BAD_STEPS:
            what = f"gradients were not finite for {MAX_BAD_STEPS} steps in a row"
            remedy = "lower --learning_rate, or train with --mixed_precision bf16; the last checkpoint is good"
            raise NotFiniteProblem(what, where=f"step {metrics.step}", remedy=remedy)
