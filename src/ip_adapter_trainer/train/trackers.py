"""Trackers beside the training: no step waits for one, and none can end a run."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

from ip_adapter_trainer.core.log import say
from ip_adapter_trainer.core.storage import reason_of

_WAITING = 1000  # reports at most; a tracker that is so far behind hangs
_PATIENCE_S = 5.0  # at the end


class Trackers:
    """An accelerator's trackers, served by a thread of their own.

    TensorBoard's writer, for one, waits without end for its own thread once the disk is full. A tracker that raises is
    told of and gets nothing more, one that hangs is left behind.

    Args:
        accelerator: its trackers are taken over; it has none afterwards.
    """

    def __init__(self, accelerator: Any) -> None:
        self._trackers, accelerator.trackers = list(accelerator.trackers), []
        self._reports: queue.Queue[Callable[[Any], object] | None] = queue.Queue(_WAITING)
        self._thread = threading.Thread(target=self._serve, name="trackers", daemon=True)
        if self._trackers:
            self._thread.start()

    def report(self, report: Callable[[Any], object]) -> None:
        """Has a report made to each tracker."""
        if self._trackers:
            self._put(report)

    def close(self) -> None:
        """Ends the trackers, once they have all reports."""
        self.report(lambda tracker: tracker.finish())
        if self._trackers:
            self._put(None)
            self._thread.join(_PATIENCE_S)

    def _put(self, report: Callable[[Any], object] | None) -> None:
        try:
            self._reports.put_nowait(report)
        except queue.Full:
            self._trackers = []
            say("the tracker hangs and gets nothing more")

    def _serve(self) -> None:
        while (report := self._reports.get()) is not None:
            for tracker in list(self._trackers):
                try:
                    report(tracker)
                except Exception as error:
                    self._trackers = [other for other in self._trackers if other is not tracker]
                    why = f"{type(error).__name__}: {reason_of(error)}"
                    say(f"the tracker {tracker.name} failed and gets nothing more: {why}")
