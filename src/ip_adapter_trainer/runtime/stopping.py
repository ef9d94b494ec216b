"""Stopping together: whichever process is asked to stop, all of them hear of it, even those that wait for another.

A process that waits in a collective hears no signal. Where one works and the others wait, they wait here instead, and
tell each other what they were asked through the key-value store over which their group met.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from ip_adapter_trainer.core.errors import Stopped

if TYPE_CHECKING:
    from ip_adapter_trainer.runtime.launch import Runtime
    from ip_adapter_trainer.runtime.signals import StopSignal

Poll = Callable[[], None]  # called often in long work; raises `core.errors.Stopped` when the run is to stop

_LOOK_S = 0.2  # between looks at what the others were asked
_WAIT_S = 0.05
_ASKED, _MET = "asked", "met"  # keys of the store
_TERMINATED = 15


def no_poll() -> None:
    """Poll for a caller whom nobody stops."""


def _meeting_store() -> Any:
    """Connect to the store that the launcher names; a run that it starts again has keys of its own there."""
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]  # some builds of torch lack them

    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    return PrefixStore(f"stopping/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


class Stopping:
    """Knows what a run's processes were asked, over all of them; one for each process, made when the group is."""

    def __init__(self, signal: StopSignal, runtime: Runtime) -> None:
        self._signal, self._runtime = signal, runtime
        self._store = _meeting_store() if runtime.world > 1 else None
        self._told = False  # the others of what this process was asked
        self._heard: int | None = None  # what another one was asked
        self._looked_s = 0.0
        self._meetings = 0

    def noted(self) -> AbstractContextManager[None]:
        """Keep signals while in this block; see `StopSignal.noted`."""
        return self._signal.noted()

    @property
    def asked(self) -> bool:
        """Tell whether this process was asked to stop, and tell the others if it was."""
        number = self._signal.asked
        if number is not None and not self._told:
            self._told = True
            self._ask_store(lambda store: store.set(_ASKED, str(number)))
        return number is not None

    @property
    def exit_code(self) -> int:
        """Give the exit code of a process that stopped because this or another one was asked to."""
        self._look()
        return 128 + (self._signal.asked or self._heard or _TERMINATED)

    def poll(self) -> None:
        """Look, often in long work, whether any process was asked to stop.

        Raises:
            Stopped: this or another process was asked to stop.
        """
        if not self.asked and time.monotonic() - self._looked_s > _LOOK_S:
            self._look()
        if self.asked or self._heard is not None:
            raise Stopped(self.exit_code)

    def together(self, work: Callable[[Poll], None]) -> None:
        """Work on every process, each at its own pace, and wait until all are done; no collective may be in it.

        Raises:
            Stopped: on all processes, if any was asked to stop before all were done.
        """
        stopped = False
        self._meetings += 1
        try:
            work(self.poll)
            self._meet()
        except Stopped:
            stopped = True
        if self._runtime.total(int(stopped)):
            raise Stopped(self.exit_code)

    def _meet(self) -> None:
        place, world = f"{_MET}/{self._meetings}", self._runtime.world
        arrived = self._ask_store(lambda store: store.add(place, 1), otherwise=world)
        while arrived < world:
            self.poll()
            time.sleep(_WAIT_S)
            arrived = self._ask_store(lambda store: store.add(place, 0), otherwise=world)

    def _look(self) -> None:
        self._looked_s = time.monotonic()
        if self._heard is None and self._ask_store(lambda store: store.check([_ASKED]), otherwise=False):
            self._heard = int(self._ask_store(lambda store: store.get(_ASKED), otherwise=_TERMINATED))

    def _ask_store(self, question: Callable[[Any], Any], otherwise: Any = None) -> Any:
        """Return the store's answer; `otherwise` where there is no store, or its process is gone."""
        if self._store is None:
            return otherwise
        try:
            return question(self._store)
        except RuntimeError:
            self._store, self._heard = None, _TERMINATED
            return otherwise
