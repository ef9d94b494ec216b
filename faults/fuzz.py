"""`python -m faults.fuzz`: mutated files for the readers of our own formats; only a `Problem` may come of one.

Guided by coverage where atheris is installed (`pip install atheris`), else by seeded mutations alone.
"""

from __future__ import annotations

import importlib.util
import os
import random
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import tyro

LIMIT_S = 10.0  # for one case
LIMIT_MB = 64.0  # more than was ever held before
_CAP_BYTES = 12 * 2**30


class Find(Exception):
    """A case that did something else than to be read or refused."""


class Fuzz:
    """The targets, and how many cases each has had."""

    def __init__(self, folder: Path) -> None:
        from faults.readers import targets

        self.folder, self.targets = folder, targets(folder)
        for target in self.targets.values():
            target.read(target.seed)  # what it imports for the first one is no find
        self.refused = dict.fromkeys(self.targets, 0)
        self.cases = dict.fromkeys(self.targets, 0)

    def case(self, name: str, content: bytes) -> None:
        """Has a target read bytes.

        Raises:
            Find: another exception than a `Problem`, no end, or a large allocation.
        """
        from ip_adapter_trainer.core.errors import Problem

        self.cases[name] += 1
        before_mb = _held_mb()
        try:
            with _time_limit():
                self.targets[name].read(content)
        except Problem:
            self.refused[name] += 1
        except Exception as error:
            raise Find(f"{name}: {type(error).__name__}: {str(error)[:200]}; {content[:300]!r}") from error
        if _held_mb() - before_mb > LIMIT_MB:
            raise Find(f"{name}: {_held_mb() - before_mb:.0f} MB more; {content[:300]!r}")

    def table(self) -> str:
        """What was done, a line a target."""
        return "\n".join(f"{n:<32}{self.cases[n]:>9,} cases, {self.refused[n]:>9,} refused" for n in self.targets)


def _held_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@contextmanager
def _time_limit() -> Iterator[None]:
    def too_long(signum: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"still reading after {LIMIT_S:g} s")

    signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def seeded(fuzz: Fuzz, cases: int, seed: int) -> list[str]:
    """Mutates the good files by a seed, each target in turn; finds, the first of each kind."""
    names, finds = list(fuzz.targets), dict[str, str]()
    for number in range(cases):
        rng = random.Random(f"{seed} {number}")
        name = names[number % len(names)]
        target = fuzz.targets[name]
        try:
            fuzz.case(name, rng.choice(target.mutations)(rng, target.seed))
        except Find as find:
            finds.setdefault(str(find).split(";")[0][:80], f"case {number}: {find}")
    return list(finds.values())


def guided(folder: Path, cases: int, seed: int) -> None:
    """Lets atheris choose the bytes by what they reach; it ends the process, at the first find with an error."""
    import atheris

    modules: Any = [
        "ip_adapter_trainer.adapters",
        "ip_adapter_trainer.storage",
        "ip_adapter_trainer.manifest",
        "ip_adapter_trainer.cache",
    ]
    with atheris.instrument_imports(include=modules):  # before anything else imports them
        import faults.readers  # noqa: F401
    fuzz, seeds, runs = Fuzz(folder), folder / "seeds", 0
    seeds.mkdir()
    names = list(fuzz.targets)
    for number, name in enumerate(names):
        (seeds / f"seed-{number}").write_bytes(bytes([number]) + fuzz.targets[name].seed)

    def one(content: bytes) -> None:
        nonlocal runs
        runs += 1
        if content:
            fuzz.case(names[content[0] % len(names)], content[1:])
        if runs == cases:
            print(fuzz.table(), flush=True)

    options = [f"-runs={cases}", f"-seed={seed + 1}", "-max_len=20000", "-rss_limit_mb=0", "-verbosity=0"]
    atheris.Setup([sys.argv[0], *options, str(seeds)], one)
    atheris.Fuzz()


def main(cases: int = 100_000, seed: int = 0, coverage: bool = importlib.util.find_spec("atheris") is not None) -> int:
    """Feeds mutated files to the readers of adapters, checkpoints, sets, settings and rows.

    Args:
        cases: over all readers.
        seed: of the mutations.
        coverage: guided by atheris.
    """
    resource.setrlimit(resource.RLIMIT_AS, (_CAP_BYTES, _CAP_BYTES))
    began, memory = time.monotonic(), Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as name:
        folder = Path(name)
        if coverage:
            child = os.fork()  # which atheris ends
            if child == 0:
                guided(folder, cases, seed)
            found = int(os.waitpid(child, 0)[1] != 0)
            print(f"{cases:,} cases guided by coverage in {time.monotonic() - began:.0f} s, {found} finds")
            return found
        fuzz = Fuzz(folder)
        finds = seeded(fuzz, cases, seed)
    print(fuzz.table())
    print(f"{cases:,} cases in {time.monotonic() - began:.0f} s, {len(finds)} finds", *finds, sep="\n")
    return 1 if finds else 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
