"""Every error that a user can meet: what went wrong, where, what to do, and its exit code."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from ip_adapter_trainer.core.redact import plain


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the error's class name where it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class Problem(ValueError):
    """A fault that its user can mend: one line what, one line where, one line what to do.

    `exit_code` is what the command line returns: 2 bad input or config.
    """

    exit_code = 2

    def __init__(self, what: str, where: str = "", remedy: str = "") -> None:
        super().__init__(what, where, remedy)
        self.what, self.where, self.remedy = what, where, remedy

    def __str__(self) -> str:
        lines = [plain(self.what)]
        if self.where:
            lines.append(f"  where: {plain(self.where)}")
        if self.remedy:
            lines.append(f"  to do: {plain(self.remedy)}")
        return "\n".join(lines)


@contextmanager
def as_load_problem(name: str, where: str, remedy: str) -> Iterator[None]:
    """Turn whatever error a library raises while it loads a user's model into a Problem of that model.

    Raises:
        Problem: in place of what the library raised.
    """
    try:
        yield
    except Exception as error:
        raise Problem(f"cannot load {name}: {first_line(error)}", where=where, remedy=remedy) from error


class DataProblem(Problem):
    """More faulty rows than the limit allows (exit 3)."""

    exit_code = 3


class StorageProblem(Problem):
    """A disk that is full, read-only or torn (exit 4)."""

    exit_code = 4


class NotFiniteProblem(Problem):
    """Loss or gradients stayed NaN or infinite (exit 5)."""

    exit_code = 5


class LostProblem(Problem):
    """Another process of the run ended or cannot be reached; what could be saved is saved (exit 143)."""

    exit_code = 143


class Stopped(Exception):
    """The run was asked to stop and has saved: 130 after SIGINT, 143 after SIGTERM."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(exit_code)
        self.exit_code = exit_code


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a remedy for an unknown name: the closest known one, or else all of them.

    >>> did_you_mean("pluss", ["base", "plus"])
    "did you mean 'plus'?"
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names) or 'none'}"
