"""Trackers beside the training: no step waits for one, and none can end a run."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping
from typing import Any

from ip_adapter_trainer.core.errors import Problem, did_you_mean
from ip_adapter_trainer.core.log import say
from ip_adapter_trainer.runtime.launch import Runtime
from ip_adapter_trainer.storage.disk import as_storage_problem, reason_of
from ip_adapter_trainer.train.config import TrackConfig

_WAITING = 1000  # reports at most; a tracker that is so far behind hangs
_PATIENCE_S = 5.0  # at the end


def trackers_named(report_to: str) -> tuple[str, ...]:
    """Return the trackers that `--report_to` names: one, several with commas between them, all that are installed.

    Raises:
        Problem: one that accelerate does not know, or that is not installed.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    names, installed = report_to.split(","), [str(name) for name in get_available_trackers()]
    for name in names:
        if name not in (*LOGGER_TYPE_TO_CLASS, "all", "none"):
            remedy = did_you_mean(name, [*LOGGER_TYPE_TO_CLASS, "all", "none"])
            raise Problem(f"unknown tracker {name!r}", where="--report_to", remedy=remedy)
        if name not in (*installed, "all", "none"):
            remedy = f"pip install {name}, or give --report_to none"
            raise Problem(f"{name} is not installed", where="--report_to", remedy=remedy)
    if "none" in names:
        return ()
    return tuple(installed) if "all" in names else tuple(dict.fromkeys(names))


def start_trackers(runtime: Runtime, config: TrackConfig, settings: Mapping[str, Any]) -> None:
    """Start what `--report_to` names, on the first process, and show it all settings of the run.

    Raises:
        Problem: on every process alike, if one does not start: it is not logged in, or does not reach its server.
    """
    simple = (int, float, str, bool)
    told = {k: v if isinstance(v, simple) else str(v) for k, v in settings.items()}
    with runtime.agreed():
        try:
            with as_storage_problem():
                runtime.accelerator.init_trackers(config.tracker_project_name, config=told)
        except Problem:
            raise
        except Exception as error:
            what = f"a tracker did not start: {type(error).__name__}: {reason_of(error)}"
            remedy = "log in to it or mend its settings, or give --report_to none"
            raise Problem(what, where=f"--report_to {config.report_to}", remedy=remedy) from error


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
        """Have a report made to each tracker."""
        if self._trackers:
            self._put(report)

    def close(self) -> None:
        """End the trackers, once they have all reports."""
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
