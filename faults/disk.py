"""Disks that fill up under a run: a small file system in memory, with ballast put on it and taken off again."""

from __future__ import annotations

import random
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from faults.lab import Finding, Lab, Process
from ip_adapter_trainer.storage.checkpoints import all_checkpoints, newest, verified

SEED = 20
SIZE_MB = 16  # three checkpoints, one of them staged, need 12
STEPS = 300
_QUIET_STEPS = 80  # at the end, when the disk has room: a run whose last save is refused ends with exit 4
_EXIT_STORAGE = 4


@contextmanager
def small_disk(folder: Path) -> Iterator[Path | None]:
    """A file system of SIZE_MB at a folder; None where this user may not mount one."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE_MB}m", "none", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    try:
        yield folder if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=False)


def fill(disk: Path) -> Path:
    """Puts ballast on a disk until it takes nothing more; removing it makes room."""
    ballast = disk / "ballast"
    with ballast.open("ab", buffering=0) as file:
        try:
            while file.write(bytes(2**16)):
                pass
        except OSError:
            return ballast
    return ballast


class Watch:
    """Looks all the time whether a good checkpoint is there once there was one."""

    def __init__(self, output: Path) -> None:
        self._output, self._ended = output, threading.Event()
        self.had_good, self.without = False, 0
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._ended.wait(0.1):
            good = any(verified(folder) for folder in reversed(all_checkpoints(self._output)))
            if not good:  # one that was removed while it was looked at has a successor
                good = any(verified(folder) for folder in reversed(all_checkpoints(self._output)))
            self.without += self.had_good and not good
            self.had_good = self.had_good or good

    def end(self) -> int:
        """How often there was none."""
        self._ended.set()
        self._thread.join()
        return self.without


def full_disks(lab: Lab) -> Iterator[Finding]:
    """A disk that fills up at random moments, at the last step, under `prepare` and under `export`."""
    place = lab.place("disk")
    with small_disk(place / "disk") as disk:
        if disk is None:
            for what in ("while training", "at the last step", "under prepare and export"):
                yield Finding(f"disk full {what}", 0, 0, None, "left out: no file system may be mounted here")
            return
        yield _while_training(lab, disk)
        yield _at_the_end(lab, disk)
        yield _other_commands(lab, disk, place)


def _while_training(lab: Lab, disk: Path) -> Finding:
    rng, tries, fills, faults = random.Random(SEED), lab.tries(20), 0, list[str]()
    refused = after_all = runs = 0
    while fills < tries:
        output = disk / "out"
        flags = lab.training(output, max_train_steps=STEPS, checkpoints_total_limit=2, report_to="tensorboard")
        process, watch = lab.start("train", flags), Watch(output)
        process.wait_until((output / "checkpoint-1").exists)
        while fills < tries and process.runs and _lines(output) < STEPS - _QUIET_STEPS:
            time.sleep(rng.uniform(0, 0.5))
            ballast = fill(disk)
            time.sleep(rng.uniform(0.5, 1.5))
            ballast.unlink()
            fills += 1
        faults += _ended_well(process, output, watch)
        said = process.said
        refused, after_all, runs = refused + said.count("a checkpoint"), after_all + said.count("after all"), runs + 1
        subprocess.run(["rm", "-rf", str(output)], check=True)
    note = (
        f"{runs} runs of {STEPS} steps with a save at each; {refused} saves refused and told, {after_all} made good "
        f"while nothing newer was due; good checkpoints under 1, runs that ended, lines lost: {len(faults)}"
    )
    note += f"; the first: {faults[0]}" if faults else ""
    return Finding("disk full while training", fills, len(faults), not faults and refused > 0, note)


def _lines(output: Path) -> int:
    return (output / "metrics.jsonl").read_text().count("\n")


def _ended_well(process: Process, output: Path, watch: Watch) -> Iterator[str]:
    code = process.wait()
    without = watch.end()
    if code:
        yield f"exit {code}: {' '.join(process.said.split())[-200:]}"
    if without:
        yield f"no good checkpoint in {without} looks"
    last = newest(output, verified)
    if last is None or last.name != f"checkpoint-{STEPS}":
        yield f"ends with {last and last.name}"
    if _lines(output) != STEPS:
        yield f"{_lines(output)} lines of metrics"


def _at_the_end(lab: Lab, disk: Path) -> Finding:
    tries, lost = lab.tries(5), 0
    for _ in range(tries):
        output = disk / "out"
        flags = lab.training(output, max_train_steps=40, checkpoints_total_limit=2)
        process = lab.start("train", flags)
        process.wait_until((output / "checkpoint-5").exists)
        ballast = fill(disk)
        code = process.wait()
        lost += code != _EXIT_STORAGE or "to do:" not in process.said or newest(output, verified) is None
        ballast.unlink()
        lost += lab.run("train", {**flags, "resume_from_checkpoint": "latest"})[0] != 0
        subprocess.run(["rm", "-rf", str(output)], check=True)
    note = f"exit {_EXIT_STORAGE} with a remedy, a good checkpoint stays; with room again the same command ends well"
    return Finding("disk full at the last step", tries, lost, not lost, note)


def _other_commands(lab: Lab, disk: Path, place: Path) -> Finding:
    run = place / "run"
    assert lab.run("train", lab.training(run, max_train_steps=1))[0] == 0
    adapter, tries, lost = disk / "adapter.safetensors", 2 * lab.tries(3), 0
    commands = {"prepare": {**lab.inputs, "prepared_dir": disk / "set"}, "export": {"output": adapter}}
    for _ in range(tries // 2):
        for command, flags in commands.items():
            operands = [run] if command == "export" else []
            ballast = fill(disk)
            code, said = lab.run(command, flags, operands=operands)
            lost += code != _EXIT_STORAGE or "to do:" not in said or adapter.exists()
            ballast.unlink()
            lost += lab.run(command, flags, operands=operands)[0] != 0
            subprocess.run(["rm", "-rf", str(disk / "set"), str(adapter)], check=True)
    note = f"exit {_EXIT_STORAGE} with a remedy, nothing half done under a final name; with room again it ends well"
    return Finding("disk full under prepare and export", tries, lost, not lost, note)
