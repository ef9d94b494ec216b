"""Stopping politely: a signal sets a flag, the loop polls it, saves and leaves; a second signal leaves at once."""

from __future__ import annotations

import os
import signal
from types import FrameType, TracebackType
from typing import Any

from ip_adapter_trainer.core.errors import Stopped

WATCHED = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))


class StopSignal:
    """Watches the stop signals while in its `with` block.

    Attributes:
        received: the first signal's number, or None.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        self._previous = {number: signal.signal(number, self._note) for number in WATCHED}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            os._exit(128 + number)
        self.received = number

    def poll(self) -> None:
        """Raises Stopped once a signal has come; called between forward passes of long work."""
        if self.received is not None:
            raise Stopped(128 + self.received)
