"""Data workers for any keys: all values in order, whatever becomes of the workers."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ip_adapter_trainer.core.errors import DataProblem, Problem, Stopped
from ip_adapter_trainer.runtime.signals import WATCHED
from ip_adapter_trainer.runtime.workers import MAX_REPLACEMENTS, Pool

COUNT = 7
pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="no such signals")


@pytest.fixture(autouse=True)
def _no_test_hangs() -> Iterator[None]:
    def too_long(number: int, frame: object) -> None:
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    assert not multiprocessing.active_children()


def _pool(function: Callable[[int], Any], workers: int, **more: Any) -> Pool[int, Any]:
    return Pool(function, where=lambda key: f"number {key}", workers=workers, timeout_s=2, **more)


def _tensors(key: int) -> dict[str, Any]:
    """Values that no socket holds at once, and values of every shape."""
    return {
        "large": torch.full((600, 500), key, dtype=torch.float32), "array": np.full(300_000, key),
        "turned": (torch.arange(6, dtype=torch.bfloat16) + key).view(3, 2).T, "number": torch.tensor(key),
        "flags": torch.tensor([True, False]), "none": torch.empty(0),
    }  # fmt: skip


@pytest.mark.parametrize("workers", [0, 2])
def test_values_come_whole_and_in_order(workers: int) -> None:
    values = list(_pool(_tensors, workers).values(range(COUNT)))
    assert len(values) == COUNT
    for key, value in enumerate(values):
        expected = _tensors(key)
        assert np.array_equal(value.pop("array"), expected.pop("array")) and value.keys() == expected.keys()
        assert all(torch.equal(value[name], expected[name]) for name in expected)
        assert all(value[name].dtype == expected[name].dtype for name in expected)


@pytest.mark.parametrize(("workers", "chunk"), [(0, 1), (2, 1), (2, 64)])
def test_keys_are_taken_as_they_are_wanted(workers: int, chunk: int) -> None:
    endless = count(-5)
    values = _pool(abs, workers, chunk=chunk).values(endless)
    assert [next(values) for _ in range(200)] == [abs(n) for n in range(-5, 195)]
    values.close()  # type: ignore[attr-defined]
    assert next(endless) < 2000


class _Trap:
    """A part of a value that once, when it is handed over, does something to the process."""

    def __init__(self, mark: Path, number: int) -> None:
        self.mark, self.number = mark, number

    def __reduce__(self) -> Any:
        if not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), self.number)
        return int, (0,)


def _trapped(mark: Path, number: int, key: int) -> tuple[Any, ...]:
    return np.full(300_000, key), _Trap(mark, number) if key == 3 else 0, np.full(300_000, key)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_that_is_lost_in_the_middle_of_a_value_is_replaced(
    number: signal.Signals, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = list(_pool(partial(_trapped, tmp_path / "mark", number), 2, chunk=2).values(range(COUNT)))
    assert [(first[-1], last[-1]) for first, _, last in values] == [(key, key) for key in range(COUNT)]
    reason = {signal.SIGKILL: "signal 9: Killed", signal.SIGSTOP: "nothing in 2 s"}[number]
    assert capsys.readouterr().err == f"a data worker was lost and is replaced (1 of 3 times here): {reason}\n"


def _deadly(key: int) -> int:
    """Costs a worker its life at the key 3."""
    if key == 3:
        os._exit(9)
    return key


@pytest.mark.parametrize("chunk", [1, 5])
def test_the_key_over_which_workers_are_lost_is_named(chunk: int) -> None:
    values = _pool(_deadly, workers=2, chunk=chunk).values(range(COUNT))
    assert [next(values) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(DataProblem, match=f"lost {MAX_REPLACEMENTS + 1} times") as caught:
        next(values)
    assert caught.value.fault.where == "number 3"


def _faulty(key: int) -> int:
    if key == 2:
        raise Problem("a fault", where="here", remedy="mend it")
    if key == 4:

        class Local(OSError):
            """An error that does not travel."""

        raise Local("a bug")
    return key


@pytest.mark.parametrize(
    ("first", "kind", "said"), [(0, Problem, "a fault\n  where: here"), (3, RuntimeError, "Local: a bug")]
)
def test_what_is_raised_in_a_worker_is_raised_here_and_ends_no_worker(
    first: int, kind: type[Exception], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    values = _pool(_faulty, workers=1).values(range(first, COUNT))
    while first not in (2, 4):
        assert next(values) == first
        first += 1
    with pytest.raises(kind, match=said) as caught:
        next(values)
    assert "_faulty" in "".join([str(caught.value), *getattr(caught.value, "__notes__", ())])
    assert not capsys.readouterr().err


def _slow(key: int) -> int:
    time.sleep(0.1)
    return key


def test_stop_signals_do_not_end_workers(capsys: pytest.CaptureFixture[str]) -> None:
    values = _pool(_slow, workers=2).values(range(COUNT))
    taken = [next(values)]
    for worker in multiprocessing.active_children():
        for number in WATCHED:
            os.kill(worker.pid or 0, number)
    assert [*taken, *values] == list(range(COUNT)) and not capsys.readouterr().err


def _endless(key: int) -> None:
    time.sleep(1000)


def test_whoever_waits_for_a_value_can_be_stopped() -> None:
    asked = time.monotonic() + 1

    def poll() -> None:
        if time.monotonic() > asked:
            raise Stopped(143)

    pool = replace(_pool(_endless, workers=2, poll=poll), timeout_s=60)
    with pytest.raises(Stopped):
        next(pool.values(range(COUNT)))
    assert time.monotonic() < asked + 3


_LEFT = """
import multiprocessing, time
from ip_adapter_trainer.runtime.workers import Pool
values = Pool(abs, where=str, workers=2, timeout_s=60).values(range(100))
next(values)
print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
"""


@pytest.mark.parametrize("ending", ["is killed", "ends"])
def test_no_worker_outlives_its_process(ending: str) -> None:
    code = _LEFT + "time.sleep(60)" * (ending == "is killed")
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    workers = [Path(f"/proc/{number}") for number in process.stdout.readline().split()]
    assert workers
    if ending == "is killed":
        process.kill()
    assert process.wait(10) == (-signal.SIGKILL if ending == "is killed" else 0)
    while any(worker.exists() for worker in workers):
        time.sleep(0.05)
