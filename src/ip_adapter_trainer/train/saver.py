"""Checkpoints written beside the training: the step waits for a copy of the state, not for the disk."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from ip_adapter_trainer.core.errors import StorageProblem
from ip_adapter_trainer.core.log import say
from ip_adapter_trainer.train import checkpoint

RETRY_S = 10.0  # from one try to the next


class Saver:
    """Writes a run's checkpoints in a thread, one at a time and in order, and removes all but the `keep` newest.

    What the disk refuses is tried again until it is written, or a newer one takes its place.
    """

    def __init__(self, output: Path, keep: int | None) -> None:
        self._output, self._keep = output, keep
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._under_way: Future[None] | None = None
        self._snapshot: checkpoint.Snapshot | None = None  # not yet on the disk
        self._refused_s: float | None = None  # when the disk refused it

    def start(self, snapshot: checkpoint.Snapshot) -> None:
        """Begin to write a checkpoint; none may be under way."""
        self._refused_s = None
        self._begin(snapshot)

    def check(self) -> None:
        """Raise a failure since the last look, or begin another try when it is time; wait for nothing.

        Raises:
            StorageProblem: the disk refused a checkpoint for the first time; earlier ones are untouched.
        """
        if self._under_way is not None:
            if self._under_way.done():
                self.settle()
        elif self._snapshot and self._refused_s and time.monotonic() - self._refused_s > RETRY_S:
            self._begin(self._snapshot)

    def settle(self) -> None:
        """Wait until no write is under way.

        Raises:
            StorageProblem: see `check`.
        """
        under_way, self._under_way = self._under_way, None
        if under_way is None:
            return
        was_refused = self._refused_s is not None
        try:
            under_way.result()
        except StorageProblem:
            self._refused_s = time.monotonic()
            if not was_refused:
                raise
            return
        if was_refused and self._snapshot:
            say(f"checkpoint-{self._snapshot.step} is saved after all")
        self._snapshot = self._refused_s = None

    def finish(self) -> None:
        """Wait until the checkpoint that was begun is on the disk; try one that was refused a last time.

        Raises:
            StorageProblem: the disk refuses still.
        """
        with suppress(StorageProblem):
            self.settle()
        if self._snapshot is not None:
            self._write(self._snapshot)

    def _begin(self, snapshot: checkpoint.Snapshot) -> None:
        assert self._under_way is None, "settle first"
        self._snapshot = snapshot
        self._under_way = self._pool.submit(self._write, snapshot)

    def _write(self, snapshot: checkpoint.Snapshot) -> None:
        checkpoint.prune(checkpoint.write(self._output, snapshot), self._keep)
