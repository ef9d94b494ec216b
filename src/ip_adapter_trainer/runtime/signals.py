"""Stopping politely: a signal sets a flag, the work polls it, saves and leaves; a second signal leaves at once."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any, NoReturn

WATCHED = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))
ECHO_S = 2.0  # launchers send on what a scheduler has sent to their children as well: that is no second signal
_OWN = os.getpid()  # workers that are forked inherit the handlers, and say nothing


def tell_at_once(line: str) -> None:
    """Print a line from the first process only, past all buffers: a signal may have come while one was written."""
    if os.getpid() == _OWN and os.environ.get("RANK", "0") == "0":
        with suppress(OSError):
            end_of_bar = "\n" if os.isatty(2) else ""
            os.write(2, f"{end_of_bar}{line}\n".encode())


def leave(number: int, line: str) -> NoReturn:
    """Print a line and end this process at once, with the exit code that tells of a signal."""
    tell_at_once(line)
    os._exit(128 + number)


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise KeyboardInterrupt with its number for every stop signal in this block, as Python does for SIGINT alone.

    While a module is imported it ends the process at once: there is nothing to save, and whoever is importing might
    take the exception for one of the module's.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        if os.getpid() != _OWN or _is_importing(frame):
            leave(number, "stopped while loading")
        raise KeyboardInterrupt(number)

    previous = {number: signal.signal(number, interrupt) for number in WATCHED}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


class StopSignal:
    """Watches the stop signals while in its `with` block.

    There, a signal leaves at once, for as long as nothing is lost by it; `noted` is for work that has to be saved.
    This handler does so even as a container's first process, to which the system's own one does not apply.

    Attributes:
        received: the first signal's number that was noted, or None.
    """

    def __init__(self, nothing_yet: str = "") -> None:
        """Make one; `nothing_yet` is what to tell of a stop that comes before there was anything to note."""
        self.received: int | None = None
        self._received_s = 0.0
        self._nothing_yet = nothing_yet
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
        """Keep a signal in this block for whoever asks; a second one, `ECHO_S` or more later, ends the process."""
        self._is_noting, self._nothing_yet = True, ""
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
            leave(number, f"stopped: {self._nothing_yet}" if self._nothing_yet else "stopped")
        now_s = time.monotonic()
        if self.received is None:
            self.received, self._received_s = number, now_s
            tell_at_once("stopping: what was done is saved first; another signal leaves at once")
        elif now_s - self._received_s > ECHO_S:
            leave(number, "stopped at once, by a second signal: what was not saved yet is lost")
