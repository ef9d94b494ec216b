"""Checkpoints written beside the training: the step waits for a copy of the state, not for the disk."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from ip_adapter_trainer.train import checkpoint


class Saver:
    """Writes a run's checkpoints in a thread, one at a time and in order, and removes old ones.

    Usage::

        saver = Saver(output, keep=3)
        saver.start(checkpoint.take(step, weights, card, state))
        saver.check()  # between steps
        saver.wait()  # before the end

    Args:
        output: the run's folder.
        keep: checkpoints that stay; None: all.
    """

    def __init__(self, output: Path, keep: int | None) -> None:
        self._output, self._keep = output, keep
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._under_way: Future[None] | None = None

    def start(self, snapshot: checkpoint.Snapshot) -> None:
        """Begins to write; there must be none under way."""
        assert self._under_way is None, "wait first"
        self._under_way = self._pool.submit(self._write, snapshot)

    def check(self) -> None:
        """Tells of a failure since the last look, without waiting.

        Raises:
            StorageProblem: the disk refused; earlier checkpoints are untouched.
        """
        if self._under_way is not None and self._under_way.done():
            self.wait()

    def wait(self) -> None:
        """Returns once what was begun is on the disk.

        Raises:
            StorageProblem: as `check`.
        """
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            under_way.result()

    def _write(self, snapshot: checkpoint.Snapshot) -> None:
        checkpoint.write(self._output, snapshot)
        checkpoint.prune(self._output, self._keep)
