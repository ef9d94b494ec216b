"""`ip-adapter check` asked by experiments: its verdict on each row, as it was printed."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from faults.lab import Lab

_FAULT = re.compile(r" *(\w+)  .*?, (?:line|element|picture) (\d+)\b")


@dataclass(frozen=True)
class Told:
    """A fault as it was printed."""

    kind: str
    line: str  # the whole of it: where, what and what to do


@dataclass(frozen=True)
class Checked:
    """What a check said; `faults` by the number of the row, as people count."""

    exit_code: int
    said: str
    faults: dict[int, list[Told]]
    pid: int


def check(lab: Lab, manifest: Path, *, watched: bool = False, **settings: Any) -> Checked:
    """Checks a manifest in a process of its own, every fault allowed and told."""
    given = {"data_json_file": manifest, "max_fault_rate": 1.0, "show_faults": 100_000, **settings}
    process = lab.start("check", given, script="faults.watch" if watched else "ip_adapter_trainer")
    exit_code, said = process.wait(), process.said
    faults = defaultdict[int, list[Told]](list)
    for line in said.splitlines():
        if found := _FAULT.match(line):
            faults[int(found[2])].append(Told(found[1], line))
    return Checked(exit_code, said, dict(faults), process.pid)
