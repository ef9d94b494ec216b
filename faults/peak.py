"""`python -m faults.peak COMMAND ...`: a command of the trainer's, and the most memory it held, on its last line."""

from __future__ import annotations

import atexit
import re
import resource
import sys
from pathlib import Path

from ip_adapter_trainer.cli import main

_LINE = re.compile(r"^peak_kb=(\d+)$", re.MULTILINE)
_CAP_BYTES = 12 * 2**30  # of addresses: what would fill the machine fails in the process alone


def peak_mb(said: str) -> float:
    """The most memory that a command held, in MB, from what it said; infinity if it was killed before it could tell."""
    found = _LINE.search(said)
    return int(found[1]) / 1024 if found else float("inf")


def _tell() -> None:
    held = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    print(f"\npeak_kb={held[1] if held else 0}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (_CAP_BYTES, _CAP_BYTES))
    atexit.register(_tell)
    main()
