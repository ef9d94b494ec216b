"""What data workers make of one key after the other; workers that die or hang are replaced at the exact place."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeVar

from torch.utils.data import DataLoader, Dataset

from ip_adapter_trainer.core.errors import DataProblem, Problem, first_line
from ip_adapter_trainer.core.log import say
from ip_adapter_trainer.runtime.stopping import Poll, no_poll

K = TypeVar("K")
V = TypeVar("V")

MAX_REPLACEMENTS = 3  # of the workers, at one place
_POLL_S = 1.0
_TIMED_OUT = "DataLoader timed out"
_RAISED_IN_WORKER = "Caught "  # how torch begins what it hands over; all else tells of dead or hung workers


def lost(over: str, where: Sequence[str], reason: str) -> DataProblem:
    """What to tell of workers that were lost again and again.

    Args:
        over: what they were to read.
        where: it is.
        reason: of the last loss.
    """
    what = f"the data workers were lost {MAX_REPLACEMENTS + 1} times over the same {over} ({reason})"
    remedy = "try --dataloader_num_workers 0, more memory, or a manifest without these rows"
    return DataProblem(what, where="; ".join(where), remedy=remedy)


@dataclass(frozen=True)
class Pool(Generic[K, V]):
    """Workers and what they do.

    Attributes:
        dataset: gives a key's value, in a worker; its values travel.
        keys: from a place on, counted from 0.
        problem: what to tell of a key over which workers were lost again and again, and why they were.
        workers: processes; 0: this one.
        ahead: values that each makes ahead.
        timeout_s: longest wait for a value.
        pin: whether values are pinned.
        poll: called every now and then while a value is waited for.
    """

    dataset: Dataset[V]
    keys: Callable[[int], Iterator[K]]
    problem: Callable[[K, str], Problem]
    workers: int
    ahead: int
    timeout_s: float
    pin: bool = False
    poll: Poll = no_poll

    def values(self, place: int = 0) -> Iterator[V]:
        """The values of the keys from a place on, in order.

        Raises:
            Problem: workers are lost at one place again and again.
        """
        losses, values = 0, self._values(place, cautiously=False)
        while True:
            try:
                value = next(values)
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError) as error:
                losses += 1
                self._demand_loss(error, place, losses)
                values = self._values(place, cautiously=True)
                continue
            place, losses = place + 1, 0
            yield value

    def _demand_loss(self, error: Exception, place: int, losses: int) -> None:
        """Returns if workers died or hung and may be replaced once more."""
        if self.workers == 0 or str(error).startswith(_RAISED_IN_WORKER):
            raise error
        reason = first_line(error)
        if losses > MAX_REPLACEMENTS:
            raise self.problem(next(self.keys(place)), reason) from error
        say(f"data workers were lost and are replaced ({losses} of {MAX_REPLACEMENTS} times here): {reason}")

    def _values(self, place: int, *, cautiously: bool) -> Iterator[V]:
        """Values from a place on; `cautiously` makes what was under way one by one, so that blame falls rightly."""
        if cautiously:
            under_way = self.workers * self.ahead
            yield from islice(self._made(place, workers=1, ahead=1), under_way)
            place += under_way
        yield from self._made(place, self.workers, self.ahead)

    def _made(self, place: int, workers: int, ahead: int) -> Iterator[V]:
        loader = DataLoader(
            self.dataset,
            batch_size=None,
            sampler=self.keys(place),  # type: ignore[arg-type]
            num_workers=workers,
            prefetch_factor=ahead if workers else None,
            timeout=_POLL_S if workers else 0,
            pin_memory=self.pin,
            collate_fn=_as_it_is,
        )
        with _child_signal_kept():
            values: Any = iter(loader)
        processes: list[BaseProcess] = list(values._workers) if workers else []
        try:
            while True:
                yield self._next(values, processes)
        except _Ended:
            return
        finally:
            del values  # torch takes leave of its workers, but waits for one that is stopped until the program's end
            _end(processes)

    def _next(self, values: Any, processes: Sequence[BaseProcess]) -> V:
        """Waits in short turns, between which torch looks whether its workers are alive.

        Torch's own time limit is none where a worker is stopped that has begun to hand over: it must answer to the
        end, or be gone. So workers are ended when time is up.
        """
        is_late = threading.Event()

        def end() -> None:
            """Time is up."""
            is_late.set()
            _end(processes)
            if not self.pin:  # a value cut short would be waited for as long as somebody could still write the rest
                with contextlib.suppress(OSError):
                    values._worker_result_queue._writer.close()

        with _timed(end, self.timeout_s if processes else None):
            while True:
                try:
                    return next(values)
                except StopIteration:
                    raise _Ended from None
                except (RuntimeError, OSError, EOFError) as error:
                    if is_late.is_set():
                        raise TimeoutError(f"nothing in {self.timeout_s:g} s") from error
                    if not str(error).startswith(_TIMED_OUT):
                        raise
                    self.poll()


class _Ended(Exception):
    """There are no more keys; StopIteration does not leave a generator as it is."""


def _as_it_is(value: V) -> V:
    """Torch would make tensors of arrays."""
    return value


def _end(processes: Sequence[BaseProcess]) -> None:
    for process in processes:
        process.kill()


@contextmanager
def _timed(act: Callable[[], None], patience_s: float | None) -> Iterator[None]:
    """Acts in a thread of its own if the block takes longer."""
    if patience_s is None:
        yield
        return
    timer = threading.Timer(patience_s, act)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def _child_signal_kept() -> Iterator[None]:
    """Undoes torch's SIGCHLD handler, which raises in the middle of whatever runs; the workers are polled."""
    before = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
    try:
        yield
    finally:
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, before)
