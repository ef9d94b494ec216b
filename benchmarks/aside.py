"""Processes of their own: memory does not come back within one, and one that dies or hangs takes nothing along."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Self

import torch

_MOST = 200  # characters of a reason


class Failed(Exception):
    """A process did not do what it was asked for.

    Args:
        reason: in one line.
        trace: where it was, as Python tells it.
    """

    def __init__(self, reason: str, trace: str = "") -> None:
        super().__init__(reason, trace)
        self.reason, self.trace = reason, trace


class DoesNotFit(Failed):
    """The device's memory is too small."""


class Process:
    """A function in a process of its own, with a pipe to it; killed when its block is left.

    Usage::

        with Process(function, *arguments) as process:  # function(pipe, *arguments)
            process.send(question)
            process.answer()
    """

    def __init__(self, function: Callable[..., None], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_guarded, args=(function, theirs, *arguments))
        self._process.start()
        theirs.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.end()
        self._pipe.close()

    def end(self) -> None:
        """Kills it: a training run would answer a mere signal with a checkpoint."""
        self._process.kill()
        self._process.join()

    def send(self, message: Any) -> None:
        """Tells it something; that it is dead shows in its answer."""
        with suppress(BrokenPipeError):
            self._pipe.send(message)

    def answer(self) -> Any:
        """What it sends next.

        Raises:
            DoesNotFit: the device's memory is too small.
            Failed: it raised something else, or died.
        """
        try:
            answer = self._pipe.recv()
        except (EOFError, ConnectionResetError) as error:
            raise Failed("its process died (out of memory?)") from error
        if isinstance(answer, Failed):
            raise answer
        return answer


def _guarded(function: Callable[..., None], pipe: Connection, *arguments: Any) -> None:
    try:
        function(pipe, *arguments)
    except torch.cuda.OutOfMemoryError as error:
        pipe.send(DoesNotFit(f"does not fit ({_one_line(error)})"))
    except Exception as error:
        pipe.send(Failed(f"{type(error).__name__}: {_one_line(error)}", traceback.format_exc()))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:_MOST]


def aside(function: Callable[..., Any], *arguments: Any) -> Any:
    """Runs a function in a process of its own, so that this one stays small; raises as `Process.answer`."""
    with Process(_call, function, *arguments) as process:
        return process.answer()


def _call(pipe: Connection, function: Callable[..., Any], *arguments: Any) -> None:
    pipe.send(function(*arguments))
