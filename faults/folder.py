"""Two runs that want the same folder."""

from __future__ import annotations

import time
from collections.abc import Iterator

from faults.lab import Finding, Lab

LIMIT_S = 1.0


def two_runs(lab: Lab) -> Iterator[Finding]:
    """A second run is refused at once and the first one is not disturbed."""
    output = lab.place("folder") / "out"
    first = lab.start("train", lab.training(output, max_train_steps=100_000, save_steps=100_000))
    first.wait_until((output / "config.yaml").exists)
    tries, lost, longest_s = lab.tries(10), 0, 0.0
    for _ in range(tries):
        began = time.monotonic()
        code, said = lab.run("train", lab.training(output, resume_from_checkpoint="latest"))
        longest_s = max(longest_s, time.monotonic() - began)
        lost += not (code == 2 and "another run is writing this folder" in said)
    lost += not first.runs
    first.kill()
    note = f"refused with exit 2, {longest_s:.1f} s at the longest (limit {LIMIT_S:g} s)"
    yield Finding("two runs in one output folder", tries, lost, not lost and longest_s <= LIMIT_S, note)
