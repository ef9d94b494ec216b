"""Every error that a user can meet: what went wrong, where, what to do, and its exit code."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Self

from ip_adapter_trainer.core.redact import one_line, plain


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the error's class name where it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@dataclass(frozen=True)
class Fault:
    """One thing that its user can mend: what, where, what to do; a row's has a `kind`, by which faults are counted."""

    kind: str
    what: str
    where: str = ""  # empty until it is known where the row stands
    remedy: str = ""

    def __post_init__(self) -> None:
        if self.kind:  # a row's may hold names out of a stranger's file, of any length
            for name in ("what", "where", "remedy"):
                object.__setattr__(self, name, one_line(getattr(self, name)))

    def __str__(self) -> str:
        return f"{self.where}: {self.what}; {self.remedy}"


class Problem(ValueError):
    """A fault that ends the command; shown as one line what, one line where, one line what to do.

    `exit_code` is what the command line returns: 2 bad input or config.
    """

    exit_code = 2

    def __init__(self, what: str, where: str = "", remedy: str = "") -> None:
        super().__init__(what, where, remedy)
        self.fault = Fault("", what, where, remedy)

    def __str__(self) -> str:
        named = (("", self.fault.what), ("  where: ", self.fault.where), ("  to do: ", self.fault.remedy))
        return "\n".join(name + plain(text) for name, text in named if text or not name)

    def but(self, **changes: str) -> Self:
        """Return the same problem with another `what`, `where` or `remedy`."""
        fault = replace(self.fault, **changes)
        return type(self)(fault.what, fault.where, fault.remedy)


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
