"""Data workers for any keys: all values in order, whatever becomes of the workers."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from torch.utils.data import Dataset

from ip_adapter_trainer.core.errors import Problem, Stopped
from ip_adapter_trainer.feed.workers import MAX_REPLACEMENTS, Pool, lost

COUNT = 7
pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="no such signals")


class _Large(Dataset[NDArray[np.float32]]):
    """Values that no pipe holds at once."""

    def __getitem__(self, key: int) -> NDArray[np.float32]:
        return np.full(300_000, key, np.float32)


class _Endless(_Large):
    """Values that never come."""

    def __getitem__(self, key: int) -> NDArray[np.float32]:
        time.sleep(1000)
        return super().__getitem__(key)


class _Deadly(_Large):
    """The key 3 costs a worker its life."""

    def __getitem__(self, key: int) -> NDArray[np.float32]:
        if key == 3:
            os._exit(9)
        return super().__getitem__(key)


@pytest.fixture(autouse=True)
def _no_test_hangs() -> Iterator[None]:
    late = list[int]()

    def too_long(number: int, frame: object) -> None:
        late.append(number)
        raise RuntimeError  # ends the wait, and torch takes it for a lost worker

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    assert not late, "it hangs"


def _pool(dataset: _Large, workers: int) -> Pool[int, NDArray[np.float32]]:
    return Pool(
        dataset=dataset, keys=lambda place: iter(range(place, COUNT)), workers=workers, ahead=2, timeout_s=2,
        problem=lambda key, reason: lost("key", [f"number {key}"], reason),
    )  # fmt: skip


@pytest.mark.parametrize("workers", [0, 2])
def test_values_come_in_order_and_end(workers: int) -> None:
    assert [value[-1] for value in _pool(_Large(), workers).values(2)] == list(range(2, COUNT))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_that_is_lost_in_the_middle_of_a_value_is_replaced(number: signal.Signals) -> None:
    values = _pool(_Large(), workers=1).values()
    taken = [next(values)]
    time.sleep(1)  # the next value fills the pipe, and the worker waits to write the rest
    (worker,) = multiprocessing.active_children()
    assert worker.pid is not None
    os.kill(worker.pid, number)
    taken += values
    assert [value[-1] for value in taken] == list(range(COUNT)) and {value.shape for value in taken} == {(300_000,)}


def test_the_key_over_which_workers_are_lost_is_named() -> None:
    values = _pool(_Deadly(), workers=2).values()
    assert [next(values)[-1] for _ in range(3)] == [0, 1, 2]
    with pytest.raises(Problem, match=f"lost {MAX_REPLACEMENTS + 1} times") as caught:
        next(values)
    assert caught.value.where == "number 3"


def test_whoever_waits_for_a_value_can_be_stopped() -> None:
    asked = time.monotonic() + 2

    def poll() -> None:
        if time.monotonic() > asked:
            raise Stopped(143)

    pool = replace(_pool(_Endless(), workers=2), timeout_s=5, poll=poll)  # else lost four times in 20 s
    with pytest.raises(Stopped):
        next(pool.values())
    assert time.monotonic() < asked + 3
    for worker in multiprocessing.active_children():
        worker.join(5)
    assert not multiprocessing.active_children()
