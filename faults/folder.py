"""Two runs that want the same folder."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

from faults.lab import Finding, Lab, Settings
from ip_adapter_trainer.core.errors import Problem
from ip_adapter_trainer.storage.staging import lock, was_claimed

LIMIT_S = 1.0
SCRIPT = Path(__file__).parents[1] / "examples" / "ip_adapter" / "tutorial_train_plus.py"


def two_runs(lab: Lab) -> Iterator[Finding]:
    """A second run is refused at once and the first one is not disturbed."""
    output, prepared = lab.place("folder") / "out", lab.place("folder") / "set"
    first = lab.start("train", lab.training(output, max_train_steps=100_000, save_steps=100_000))
    first.wait_until((output / "config.yaml").exists)
    preparing = lab.start("prepare", {**lab.inputs, "prepared_dir": prepared})
    preparing.wait_until(lambda: was_claimed(prepared) and _is_held(prepared), pause_s=0.05)
    preparing.send(signal.SIGSTOP)
    seconds: list[tuple[str, float]] = []
    tries, lost = lab.tries(10), 0
    for _ in range(tries):
        for command, settings in _second_starts(lab, output, prepared).items():
            began = time.monotonic()
            code, said = lab.run(command, settings)
            seconds.append((Path(command).stem, time.monotonic() - began))
            lost += not (code == 2 and "another run is writing this folder" in said)
    preparing.send(signal.SIGCONT)
    lost += not first.runs or preparing.wait() != 0
    first.kill()
    command, longest_s = max(seconds, key=lambda pair: pair[1])
    note = (
        "train, a drop-in script and prepare are refused with exit 2, "
        f"{longest_s:.1f} s from start to exit at the longest ({command}; limit {LIMIT_S:g} s)"
    )
    yield Finding("two runs in one output folder", len(seconds), lost, not lost and longest_s <= LIMIT_S, note)


def _is_held(folder: Path) -> bool:
    """Whether a process writes a folder now; looking holds its lock for an instant, which that process allows for."""
    try:
        lock(folder, patience_s=0).release()
    except Problem:
        return True
    return False


def _second_starts(lab: Lab, output: Path, prepared: Path) -> dict[str, Settings]:
    training = lab.training(output, resume_from_checkpoint="latest")
    return {"train": training, str(SCRIPT): training, "prepare": {**lab.inputs, "prepared_dir": prepared}}
