"""Whichever process is asked to stop, all of them stop."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed import TCPStore

from ip_adapter_trainer.core.errors import Stopped
from ip_adapter_trainer.runtime.stopping import Stopping


class Group:
    """Processes of a run as threads, over a store as launchers serve it."""

    def __init__(self, world: int, monkeypatch: pytest.MonkeyPatch, server: TCPStore | None = None) -> None:
        self.server = server or TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(self.server.port))
        self._sums, self._meeting = list[int](), threading.Barrier(world)
        runtime: Any = SimpleNamespace(world=world, total=self._total)
        self.signals: list[Any] = [SimpleNamespace(asked=None) for _ in range(world)]
        self.members = [Stopping(own, runtime) for own in self.signals]

    def _total(self, number: int) -> int:
        self._sums.append(number)
        self._meeting.wait(20)
        return sum(self._sums)

    def work(self, *works: Callable[[Callable[[], None]], None]) -> list[int | None]:
        """Each does its work together with the others; exit codes of those that stopped."""

        def one(member: Stopping, work: Callable[[Callable[[], None]], None]) -> int | None:
            try:
                member.together(work)
            except Stopped as stopped:
                return stopped.exit_code
            return None

        with ThreadPoolExecutor(len(works)) as pool:
            return list(pool.map(one, self.members, works))


def _endless(poll: Callable[[], None]) -> None:
    end = time.monotonic() + 20
    while time.monotonic() < end:
        poll()
        time.sleep(0.01)
    raise AssertionError("it never heard of the stop")


def test_a_stop_that_reaches_one_that_waits_stops_the_one_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    group = Group(2, monkeypatch)
    threading.Timer(0.3, lambda: setattr(group.signals[1], "asked", signal.SIGUSR1)).start()
    assert group.work(_endless, lambda poll: None) == [138, 138]


def test_a_stop_that_reaches_one_that_works_stops_those_that_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    group = Group(3, monkeypatch)
    threading.Timer(0.3, lambda: setattr(group.signals[0], "asked", signal.SIGINT)).start()
    assert group.work(_endless, lambda poll: None, lambda poll: None) == [130, 130, 130]


def test_without_a_stop_all_wait_for_the_slowest(monkeypatch: pytest.MonkeyPatch) -> None:
    group, done = Group(2, monkeypatch), list[float]()

    def slow(poll: Callable[[], None]) -> None:
        time.sleep(0.4)
        done.append(time.monotonic())

    assert group.work(slow, lambda poll: None) == [None, None]
    assert done and done[0] <= time.monotonic()


def test_a_store_that_is_gone_means_a_launcher_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    group = Group(2, monkeypatch)
    del group.server
    with pytest.raises(Stopped, match="143"):
        group.members[0].poll()


def test_a_run_that_is_started_again_hears_nothing_of_the_stop_before(monkeypatch: pytest.MonkeyPatch) -> None:
    group = Group(2, monkeypatch)
    group.signals[0].asked = signal.SIGTERM
    assert group.work(_endless, _endless) == [143, 143]
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert Group(2, monkeypatch, group.server).work(lambda poll: None, lambda poll: poll()) == [None, None]
