"""Stopping politely: a signal sets a flag, the work polls it, saves and leaves; a second signal leaves at once."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

WATCHED = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))
ECHO_S = 2.0  # launchers send on what a scheduler has sent to their children as well: that is no second signal


class StopSignal:
    """Watches the stop signals while in its `with` block.

    There, a signal leaves at once, for as long as nothing is lost by it; `noted` is for work that has to be saved.
    This handler does so even as a container's first process, to which the system's own one does not apply.

    Attributes:
        received: the first signal's number that was noted, or None.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._received_s = 0.0
        self._is_noting = False
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        self._previous = {number: signal.signal(number, self._note) for number in WATCHED}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextmanager
    def noted(self) -> Iterator[None]:
        """In this block a signal is kept for whoever asks; one that comes `ECHO_S` or more after it leaves at once."""
        self._is_noting = True
        try:
            yield
        finally:
            self._is_noting = False

    @property
    def asked(self) -> int | None:
        """The signal that asks this process to stop; SIGTERM where its launcher is gone; None: go on."""
        if self.received is None and self._launcher not in (None, os.getppid()):
            self.received, self._received_s = signal.SIGTERM, time.monotonic()
        return self.received

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self._is_noting:
            os._exit(128 + number)
        now_s = time.monotonic()
        if self.received is None:
            self.received, self._received_s = number, now_s
        elif now_s - self._received_s > ECHO_S:
            os._exit(128 + number)
