"""Saves of a run's state, also where the disk, or the run, fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ip_adapter_trainer.core.errors import NotFiniteProblem, StorageProblem
from ip_adapter_trainer.core.log import say
from ip_adapter_trainer.train.checkpoint import Snapshot

if TYPE_CHECKING:
    from ip_adapter_trainer.runtime.launch import Runtime
    from ip_adapter_trainer.train.saver import Saver
    from ip_adapter_trainer.train.state import TrainState
    from ip_adapter_trainer.train.step_log import StepLog


class Saving:
    """Saves a run's state, at most once for each step; a full disk is told of and training goes on.

    `snapshot` copies the state as it is now, with all that a checkpoint says of its run. The numbers of the steps are
    written before the checkpoint of their step.
    """

    def __init__(
        self, state: TrainState, saver: Saver, snapshot: Callable[[], Snapshot], log: StepLog, runtime: Runtime
    ) -> None:
        self._state, self.saver, self._snapshot, self._log, self._runtime = state, saver, snapshot, log, runtime
        self._saved = state.global_step  # the last that was written or tried; before the first is nothing to save

    def check(self) -> None:
        """Tell of what the disk refused since the last look."""
        self._tell_of(self.saver.check)

    def save(self) -> None:
        """Begin a checkpoint of this very step unless there is one; `finish` waits for it.

        Raises:
            NotFiniteProblem: on every process alike, whose weights are the same.
        """
        if self._saved == self._state.global_step:
            return
        self._state.demand_finite()
        self._log.write_pending()
        if self._runtime.is_main:
            self._tell_of(self.saver.settle)
            self.saver.start(self._snapshot())
        self._saved = self._state.global_step  # on every process alike

    def finish(self) -> None:
        """Wait until the last checkpoint is on the disk.

        Raises:
            StorageProblem: the disk refused it, and there will be no later one.
        """
        with self._runtime.agreed():
            if self._runtime.is_main:
                self.saver.finish()

    def rescue(self) -> None:
        """Keep what was trained after an error of any kind; other processes are not waited for, they may be gone."""
        if not self._runtime.is_main:
            return
        self._tell_of(self.saver.settle)
        if self._saved == self._state.global_step:
            return
        self._log.write_pending()
        try:
            self._state.demand_finite()
            self.saver.start(self._snapshot())
            self.saver.finish()
            say(f"saved checkpoint-{self._state.global_step} before stopping")
        except (NotFiniteProblem, StorageProblem) as problem:
            say(str(problem))

    @staticmethod
    def _tell_of(saving: Callable[[], None]) -> None:
        try:
            saving()
        except StorageProblem as problem:
            say(str(problem))
