"""Output folders that vanish or turn read-only under a run, and logs that nobody takes."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from faults.lab import Finding, Lab, Process
from ip_adapter_trainer.storage.checkpoints import newest, verified

STEPS = 200  # more than pass while the folder is read-only
_PATIENCE_S = 5.0
_EXIT_STORAGE = 4


@contextmanager
def read_only(folder: Path) -> Iterator[bool]:
    """A folder that refuses every new write while open files stay as they are; False where none may be mounted."""
    bound = _mount("--bind", folder, folder)
    end = time.monotonic() + _PATIENCE_S
    while bound and not (refuses := _mount("-o", "remount,bind,ro", folder)) and time.monotonic() < end:
        time.sleep(0.01)  # a file is being written through it
    try:
        yield bound and refuses
    finally:
        if bound:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _mount(*arguments: object) -> bool:
    try:
        return subprocess.run(["mount", *map(str, arguments)], capture_output=True).returncode == 0
    except OSError:
        return False


def gone_folders(lab: Lab) -> Iterator[Finding]:
    """A folder that is removed, one that is read-only for a while, and one that is so from the start."""
    yield _removed(lab)
    yield _refusing(lab)
    yield _refusing_at_first(lab)


def _begun(lab: Lab) -> tuple[Path, Process]:
    """A run that saves at every step, once it has saved."""
    output = lab.place("gone") / "out"
    settings = {"max_train_steps": STEPS, "checkpoints_total_limit": 2, "report_to": "tensorboard"}
    process = lab.start("train", lab.training(output, **settings))
    process.wait_until((output / "checkpoint-3").exists)
    return output, process


def _ends_well(output: Path, process: Process) -> bool:
    last = newest(output, verified) if process.wait() == 0 else None
    return last is not None and last.name == f"checkpoint-{STEPS}"


def _removed(lab: Lab) -> Finding:
    tries, lost = lab.tries(4), 0
    for _ in range(tries):
        output, process = _begun(lab)
        shutil.rmtree(output, ignore_errors=True)  # the run may put something in meanwhile
        lost += not _ends_well(output, process)
    note = "removed in the middle of a run, which makes it again: the last step is saved and verifies, exit 0"
    return Finding("the output folder vanishes", tries, lost, not lost, note)


def _refusing(lab: Lab) -> Finding:
    fault, tries, lost, refused = "the output folder is read-only for a while", lab.tries(4), 0, 0
    for _ in range(tries):
        output, process = _begun(lab)
        with read_only(output) as bound:
            if not bound:
                process.kill()
                return Finding(fault, 0, 0, None, "left out: no folder may be mounted here")
            time.sleep(2)
        kept = _ends_well(output, process) and (output / "metrics.jsonl").read_text().count("\n") == STEPS
        lost += not kept
        refused += process.said.count("was not saved: Read-only file system")
    note = f"2 s in the middle of a run, {refused} saves refused and told: all {STEPS} lines of metrics are there, "
    note += "the last step is saved and verifies, exit 0"
    return Finding(fault, tries, lost, not lost and refused > 0, note)


def _refusing_at_first(lab: Lab) -> Finding:
    fault, tries, lost = "the output folder is read-only from the start", 2 * lab.tries(2), 0
    for _ in range(tries // 2):
        folder = lab.place("gone")
        with read_only(folder) as bound:
            if not bound:
                return Finding(fault, 0, 0, None, "left out: no folder may be mounted here")
            settings = {
                "train": lab.training(folder / "out"),
                "prepare": {**lab.inputs, "prepared_dir": folder / "set"},
            }
            for command, flags in settings.items():
                code, said = lab.run(command, flags)
                lost += code != _EXIT_STORAGE or "to do:" not in said
    note = f"train and prepare exit {_EXIT_STORAGE} with a remedy"
    return Finding(fault, tries, lost, not lost, note)
