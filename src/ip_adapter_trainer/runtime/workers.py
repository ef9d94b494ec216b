"""Values that worker processes make of keys, in order; a worker that dies or hangs is replaced at the exact key.

Each worker is served by a thread of this process, which hands it some keys at a time over a socket and takes the
values one by one as they are made. So it is known at which key a worker was lost, and the others do not notice.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from ip_adapter_trainer.core.errors import DataProblem
from ip_adapter_trainer.core.log import say
from ip_adapter_trainer.runtime.signals import WATCHED
from ip_adapter_trainer.runtime.stopping import Poll, no_poll

if TYPE_CHECKING:
    from torch import Tensor

K = TypeVar("K")
V = TypeVar("V")

MAX_REPLACEMENTS = 3  # of a worker, at one key
_POLL_S = 1.0
_LOST = (OSError, EOFError, pickle.UnpicklingError)  # what the end or the silence of a worker makes a stream raise
_STARTING = threading.Lock()  # a worker forked meanwhile would keep the end of another one's socket open


@dataclass(frozen=True)
class Pool(Generic[K, V]):
    """A function and the worker processes that call it."""

    function: Callable[[K], V]  # makes the value of a key, in a worker
    where: Callable[[K], str]  # tells where a key comes from, should workers be lost over it again and again
    workers: int  # number of processes; 0: this one calls the function
    timeout_s: float  # longest time that a worker may take for one value
    ahead: int = 2  # how many chunks of keys are handed out for each worker before their values are wanted
    chunk: int = 1  # keys that are handed out at a time; more than one for values that are quickly made
    pin: bool = False  # whether workers' tensors are received into pinned memory
    poll: Poll = no_poll  # called every now and then while a value is waited for

    def values(self, keys: Iterable[K]) -> Iterator[V]:
        """Yield the value of each key, in order.

        Raises:
            DataProblem: workers are lost over one key again and again.
            Exception: what the function raised, when it is that key's turn.
        """
        if self.workers == 0:
            yield from map(self.function, keys)
            return
        workers = [_Worker(self) for _ in range(self.workers)]
        free, rest, under_way = list(workers), iter(keys), deque[Future[list[Any]]]()
        own = threading.local()

        def begin() -> None:
            """Give a thread its worker, and both no stop signals: the main thread decides when to stop."""
            if hasattr(signal, "pthread_sigmask"):
                signal.pthread_sigmask(signal.SIG_BLOCK, WATCHED)
            own.worker = free.pop()

        with ThreadPoolExecutor(self.workers, initializer=begin) as threads:
            try:
                while True:
                    while len(under_way) <= self.workers * self.ahead and (chunk := list(islice(rest, self.chunk))):
                        under_way.append(threads.submit(lambda keys: own.worker.make(keys), chunk))
                    if not under_way:
                        return
                    while not wait([under_way[0]], _POLL_S).done:
                        self.poll()
                    for value in under_way.popleft().result():
                        if isinstance(value, _Raised):
                            raise value.error
                        yield value
            finally:
                threads.shutdown(wait=False, cancel_futures=True)
                for worker in workers:
                    worker.close()


class _Raised(NamedTuple):
    error: Exception  # that the function raised in a worker


class _Worker:
    """A process, started when there is something to do for it, and again when it was lost."""

    def __init__(self, pool: Pool[Any, Any]) -> None:
        self._pool = pool
        self._process: BaseProcess | None = None
        self._stream: Any = None
        self._is_closed = False
        atexit.register(self.close)  # comes before multiprocessing's own, which would wait for the process

    def make(self, keys: list[Any]) -> list[Any]:
        """Return the values of keys, up to one that raises because workers are lost over it again and again."""
        values: list[Any] = []
        losses = 0
        while len(values) < len(keys):
            stream = self._stream or self._started()
            try:
                pickle.dump(keys[len(values) :], stream)
                stream.flush()
                while len(values) < len(keys):
                    values.append(_receive(stream, pin=self._pool.pin))
                    losses = 0
            except _LOST as error:
                if self._is_closed:
                    raise
                losses, reason = losses + 1, self._end(error)
                if losses > MAX_REPLACEMENTS:
                    what = f"data workers were lost {losses} times over the same rows ({reason})"
                    remedy = "try --dataloader_num_workers 0, more memory, or a manifest without these rows"
                    return [*values, _Raised(DataProblem(what, self._pool.where(keys[len(values)]), remedy))]
                say(f"a data worker was lost and is replaced ({losses} of {MAX_REPLACEMENTS} times here): {reason}")
        return values

    def _started(self) -> Any:
        with _STARTING:
            if self._is_closed:
                raise EOFError
            here, there = socket.socketpair()
            with here, there:
                context: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
                self._process = context.Process(target=_work, args=(self._pool.function, there, here), daemon=True)
                self._process.start()
                here.settimeout(self._pool.timeout_s)
                self._stream = here.makefile("rwb")
        return self._stream

    def _end(self, error: Exception) -> str:
        """End the process that was lost, should it still run, and return what happened to it."""
        process, self._process, self._stream = self._process, None, None
        assert process is not None
        if isinstance(error, TimeoutError):
            reason = f"nothing in {self._pool.timeout_s:g} s"
        else:
            process.join(_POLL_S)
            code = process.exitcode or 0
            reason = f"exit code {code}" if code >= 0 else f"signal {-code}: {signal.strsignal(-code)}"
        process.kill()
        process.join()
        return reason

    def close(self) -> None:
        """End the process for good; the thread that waits for it goes on, and finds no other."""
        atexit.unregister(self.close)
        with _STARTING:
            self._is_closed = True
            process = self._process
        if process is not None:
            process.kill()
            process.join()


def _work(function: Callable[[Any], Any], there: socket.socket, here: socket.socket) -> None:
    """Make values for as long as the other process is there to ask for them."""
    here.close()
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    asking: Any = multiprocessing.parent_process()
    stream: Any = there.makefile("rwb")
    with suppress(OSError, EOFError):  # it is gone
        while True:
            while not connection.wait([there], _POLL_S):
                if os.getppid() != asking.pid:
                    return
            for key in pickle.load(stream):
                _send(stream, _made(function, key))


def _made(function: Callable[[Any], Any], key: Any) -> Any:
    try:
        return function(key)
    except Exception as error:
        error.add_note(f"in a data worker: {traceback.format_exc()}")
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            return _Raised(RuntimeError(traceback.format_exc()))
        return _Raised(error)


class _Pickler(pickle.Pickler):
    """Leaves tensors out, whose bytes are sent after the rest."""

    tensors: tuple[Tensor, ...] = ()

    def persistent_id(self, value: Any) -> Any:
        """Return dtype and shape of a tensor; None for all else."""
        torch = sys.modules.get("torch")
        if torch is None or not isinstance(value, torch.Tensor):
            return None
        self.tensors += (value.contiguous(),)
        return value.dtype, value.shape


class _Unpickler(pickle.Unpickler):
    """Makes the tensors that were left out, whose bytes are still to come."""

    tensors: tuple[Tensor, ...] = ()
    pin = False

    def persistent_load(self, described: Any) -> Tensor:
        """Return a tensor of a dtype and a shape."""
        import torch

        dtype, shape = described
        self.tensors += (torch.empty(shape, dtype=dtype, pin_memory=self.pin),)
        return self.tensors[-1]


def _send(stream: Any, value: Any) -> None:
    pickler = _Pickler(stream)
    pickler.dump(value)
    for tensor in pickler.tensors:
        stream.write(_bytes_of(tensor))
    stream.flush()


def _receive(stream: Any, *, pin: bool) -> Any:
    unpickler = _Unpickler(stream)
    unpickler.pin = pin
    value = unpickler.load()
    for tensor in unpickler.tensors:
        if stream.readinto(_bytes_of(tensor)) < tensor.nbytes:
            raise EOFError
    return value


def _bytes_of(tensor: Tensor) -> Any:
    """Return the memory of a tensor without gaps."""
    return tensor.flatten().view(sys.modules["torch"].uint8).numpy()
