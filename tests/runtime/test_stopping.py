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
import torch

from ip_adapter_trainer.core.errors import Stopped
from ip_adapter_trainer.runtime.stopping import Stopping


class Group:
    """Processes of a run as threads, over a real store."""

    def __init__(self, world: int, monkeypatch: pytest.MonkeyPatch) -> None:
        store = torch.distributed.HashStore()
        monkeypatch.setattr(torch.distributed.distributed_c10d, "_get_default_store", lambda: store)
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

    class Gone:
        """As the client of a server that ended."""

        def check(self, keys: list[str]) -> bool:
            raise RuntimeError("Connection reset by peer")

    group.members[0]._store = Gone()
    with pytest.raises(Stopped, match="143"):
        group.members[0].poll()
