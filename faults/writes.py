"""Writes that a system refuses in their middle although the disk has room, and those of everything at once."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from faults.lab import Finding, Lab, Process
from ip_adapter_trainer.storage.checkpoints import newest, verified
from ip_adapter_trainer.train.saver import RETRY_S

_MIDDLE_BYTES = 2**20  # of a checkpoint's larger file
_SAVE_STEPS = 30  # more than pass while a refused save is tried again
_ENDLESS = 100_000
_BROKEN = 3  # pictures, while nothing can be written
_REFUSED_S = 8.0  # more than a pass over the rows
_GRACE_STEPS = 20  # with room again, for lines that waited
_STOPPED = 128 + signal.SIGTERM


def refused_writes(lab: Lab) -> Iterator[Finding]:
    """A save that breaks off in its middle, and a while in which no file takes a byte."""
    for fault, done in (("a save fails in its middle", _broken_save), ("no file can be written for a while", _nothing)):
        try:
            yield done(lab, fault)
        except PermissionError:
            yield Finding(fault, 0, 0, None, "left out: no other process may be limited here")


def _limit(process: Process, size_bytes: int) -> None:
    """No file that the process writes grows beyond a size; -1: any may."""
    _, hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size_bytes, hard))


def _says(words: str, process: Process) -> bool:
    return words in process.said


def _steps(output: Path) -> list[int]:
    """Those in the metrics, in order of the file."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [row["step"] for row in rows if "lr" in row]


def _stops_whole(output: Path, process: Process) -> Iterator[str]:
    """Stops a run; what is wrong with what it leaves."""
    process.send(signal.SIGTERM)
    if (code := process.wait()) != _STOPPED:
        yield f"exit {code}"
    steps, last = _steps(output), newest(output, verified)
    if steps != list(range(1, len(steps) + 1)):
        yield "steps are missing in the metrics"
    if last is None or last.name != f"checkpoint-{len(steps)}":
        yield f"{len(steps)} steps, saved {last and last.name}"


def _told(fault: str, tries: int, wrong: list[list[str]], note: str) -> Finding:
    lost = [one for one in wrong if one]
    note += f"; faults: {len(lost)}" + (f"; the first: {', '.join(lost[0])}" if lost else "")
    return Finding(fault, tries, len(lost), not lost, note)


def _broken_save(lab: Lab, fault: str) -> Finding:
    tries = lab.tries(4)
    wrong = [list(_one_broken_save(lab)) for _ in range(tries)]
    note = f"broken off after {_MIDDLE_BYTES / 2**20:.0f} MB with room on the disk: told, nothing half written stays, "
    note += f"the older one is good; {RETRY_S:.0f} s later the same one is saved after all, in the middle of the run"
    return _told(fault, tries, wrong, note)


def _one_broken_save(lab: Lab) -> Iterator[str]:
    output = lab.place("writes") / "out"
    process = lab.start("train", lab.training(output, max_train_steps=_ENDLESS, save_steps=_SAVE_STEPS))
    process.wait_until((output / f"checkpoint-{_SAVE_STEPS}").exists)
    _limit(process, _MIDDLE_BYTES)
    process.wait_until(partial(_says, "the checkpoint was not saved", process))
    process.send(signal.SIGSTOP)  # time passes and no step, so that no newer save takes the place of the refused one
    last, refused = newest(output, verified), output / f"checkpoint-{2 * _SAVE_STEPS}"
    if last is None or last.name != f"checkpoint-{_SAVE_STEPS}":
        yield f"the good checkpoint is {last and last.name}"
    if left := [path.name for path in output.glob(".*checkpoint*")]:
        yield f"{left[0]} stays"
    if "a checkpoint needs" in process.said:
        yield "the room was refused, not the write"
    _limit(process, -1)
    time.sleep(RETRY_S)
    process.send(signal.SIGCONT)
    told = partial(_says, f"{refused.name} is saved after all", process)
    process.wait_until(lambda: told() or len(_steps(output)) > 4 * _SAVE_STEPS)
    if not (refused.exists() and verified(refused)):
        yield f"{refused.name} was not tried again"
    yield from _stops_whole(output, process)


def _nothing(lab: Lab, fault: str) -> Finding:
    tries, passed = lab.tries(4), list[int]()
    wrong = [list(_one_without_writes(lab, passed)) for _ in range(tries)]
    note = f"{_REFUSED_S:.0f} s in which checkpoints, metrics, faults, grids, TensorBoard and the log are refused, and "
    note += f"{_BROKEN} pictures break: {sum(passed)} steps went on, one good checkpoint at least, no line of "
    note += "metrics.jsonl and faults.jsonl is lost; stopped later, the run saves its step"
    return _told(fault, tries, wrong, note)


def _one_without_writes(lab: Lab, passed: list[int]) -> Iterator[str]:
    place = lab.place("writes")
    output, images = place / "out", place / "images"
    shutil.copytree(lab.pocket / "images", images)
    flags = lab.training(
        output, max_train_steps=_ENDLESS, checkpoints_total_limit=2, report_to="tensorboard", data_root_path=images,
        validation_steps=10, num_validation_images=2, grid_rows=1, grid_steps=2, max_fault_rate=0.5,
    )  # fmt: skip
    process = lab.start("train", flags)
    process.wait_until((output / "grids" / "step-0000010.png").exists)
    _limit(process, 0)
    before, grids = len(_steps(output)), len(list((output / "grids").iterdir()))
    broken = sorted(path for path in images.iterdir() if not path.stem.endswith("_prompt"))[:_BROKEN]
    for path in broken:
        path.write_bytes(path.read_bytes()[:100])
    time.sleep(_REFUSED_S)
    if newest(output, verified) is None:
        yield "no good checkpoint"
    if len(_steps(output)) > before + 1 or len(list((output / "grids").iterdir())) > grids + 1:
        yield "something was written"
    _limit(process, -1)
    process.wait_until(lambda: len(_steps(output)) > before + 1)
    back = len(_steps(output))
    passed.append(back - before)
    process.wait_until(
        lambda: all(path.name in _listed(output) for path in broken) or len(_steps(output)) > back + _GRACE_STEPS
    )
    if missing := [path.name for path in broken if path.name not in _listed(output)]:
        yield f"{missing[0]} is not in faults.jsonl"
    yield from _stops_whole(output, process)


def _listed(output: Path) -> str:
    file = output / "faults.jsonl"
    return file.read_text() if file.exists() else ""
