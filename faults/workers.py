"""Data workers that die or hang under a run."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from faults.chains import SEED, differing
from faults.files import Rows, rows_of
from faults.lab import Finding, Lab, Process
from ip_adapter_trainer.runtime.workers import MAX_REPLACEMENTS
from ip_adapter_trainer.train.checkpoint import TENSORS, WEIGHTS

STEPS = 60
TIMEOUT_S = 2
_GAP_S = 3.0  # at most, between one blow and the next
_KINDS = {signal.SIGKILL: "dies", signal.SIGSTOP: "hangs"}
_PATIENCE_S = 90.0
_READING_S = 0.2  # in which the pictures of the lab are read
_REPLACED = "a data worker was lost and is replaced"
_EXIT_DATA = 3


@dataclass(frozen=True)
class _Undisturbed:
    """A run whose workers were left in peace."""

    lab: Lab
    place: Path
    settings: Mapping[str, Any]

    @classmethod
    def of(cls, lab: Lab) -> _Undisturbed:
        """Does the run."""
        place = lab.place("workers")
        workers = {"dataloader_num_workers": 2, "data_timeout_s": TIMEOUT_S}
        settings = lab.training(place / "calm", max_train_steps=STEPS, save_steps=STEPS, **workers)
        code, said = lab.run("train", settings)
        assert code == 0, said
        return cls(lab, place, settings)

    def again(self, name: str) -> tuple[Process, Path]:
        """Starts it anew, in a folder of its own."""
        output = self.place / name
        return self.lab.start("train", {**self.settings, "output_dir": output}), output

    def faults(self, process: Process, output: Path) -> Iterator[str]:
        """What is not as without the blows, once it ended."""
        try:
            code = process.wait(_PATIENCE_S)
        except TimeoutError:
            yield "the run hangs"
            return
        if code:
            yield f"exit {code}: {' '.join(process.said.split())[-200:]}"
            return
        names = [f"checkpoint-{STEPS}/{WEIGHTS}", f"checkpoint-{STEPS}/{TENSORS}", "metrics.jsonl"]
        yield from differing(output, self.place / "calm", names)
        if process.members():
            yield "a worker lives on"


def lost_workers(lab: Lab) -> Iterator[Finding]:
    """Workers are killed, or stopped for good, at random moments; then every worker as soon as it is there."""
    undisturbed = _Undisturbed.of(lab)
    for number in _KINDS:
        yield _at_random(undisturbed, number)
    yield _again_and_again(undisturbed)


def _at_random(undisturbed: _Undisturbed, number: signal.Signals) -> Finding:
    word, wanted = _KINDS[number], undisturbed.lab.tries(20)
    rng, runs, replaced, faults = random.Random(f"{SEED}-{word}"), 0, 0, list[str]()
    while replaced < wanted and runs < 2 * wanted:  # a run may end without missing the worker that was struck last
        process, output = undisturbed.again(f"{word}-{runs}")
        while replaced + _replacements(process) < wanted and _comes(process, rng):
            if not _is_felt(process, rng.choice(process.children() or [0]), number):
                break
        faults += undisturbed.faults(process, output)
        runs, replaced = runs + 1, replaced + _replacements(process)
        process.kill()
    note = f"workers were struck and replaced {replaced} times in {runs} runs of {STEPS} steps; runs with other bytes: "
    note += f"{len(faults)}" + (f"; the first: {faults[0]}" if faults else "")
    return Finding(f"a data worker {word}", replaced, len(faults), not faults and replaced >= wanted, note)


def _is_felt(process: Process, worker: int, number: signal.Signals) -> bool:
    """Strikes a worker and waits until it is replaced; False if the run ends without it, or hangs."""
    before, end = _replacements(process), time.monotonic() + _PATIENCE_S
    if not _strike(worker, number):
        return True  # it had ended by itself, or there is none
    process.wait_until(lambda: _replacements(process) > before or time.monotonic() >= end, pause_s=0.05)
    return _replacements(process) > before


def _replacements(process: Process) -> int:
    """How often a run's workers were, so far."""
    return process.said.count(_REPLACED)


def _comes(process: Process, rng: random.Random) -> bool:
    """Waits for workers and a random moment of their lives; False if the run ended before."""
    if not process.wait_until(process.children, pause_s=0.05):
        return False
    end = time.monotonic() + rng.uniform(0, _GAP_S)
    return process.wait_until(lambda: time.monotonic() >= end)


def _again_and_again(undisturbed: _Undisturbed) -> Finding:
    tries, faults, longest_s = undisturbed.lab.tries(6), list[str](), 0.0
    for run in range(tries):
        number = list(_KINDS)[run % len(_KINDS)]
        process, _ = undisturbed.again(f"always-{run}")
        process.wait_until(process.children)
        began = time.monotonic()
        while process.runs:
            for worker in process.children():
                _strike(worker, number)
            time.sleep(0.05)
        longest_s = max(longest_s, time.monotonic() - began)
        said = process.said
        named = f"were lost {MAX_REPLACEMENTS + 1} times over the same" in said and "data.json, element" in said
        if process.wait() != _EXIT_DATA or not named:
            faults.append(f"exit {process.wait()}: {' '.join(said.split())[-200:]}")
    note = (
        f"killed or stopped {MAX_REPLACEMENTS + 1} times at one batch, the run ends with exit {_EXIT_DATA} and names "
        f"the rows, after {longest_s:.0f} s at the longest (--data_timeout_s {TIMEOUT_S})"
    )
    return Finding("every data worker is lost", tries, len(faults), not faults, "; ".join([note, *faults[:1]]))


def lost_workers_of_prepare(lab: Lab) -> Iterator[Finding]:
    """A worker is killed, or stopped for good, while it reads pictures for a prepared set."""
    place, tries = lab.place("workers-of-prepare"), lab.tries(20)
    settings = {**lab.inputs, "dataloader_num_workers": 2, "data_timeout_s": TIMEOUT_S}
    code, said = lab.run("prepare", {**settings, "prepared_dir": place / "calm"})
    assert code == 0, said
    whole, rng, faults, replaced = rows_of(place / "calm"), random.Random(SEED), list[str](), 0
    for run in range(tries):
        process = lab.start("prepare", {**settings, "prepared_dir": place / f"set-{run}"})
        process.wait_until(process.children)
        time.sleep(rng.uniform(0, _READING_S))
        _strike(rng.choice(process.children() or [0]), list(_KINDS)[run % len(_KINDS)])
        faults += _prepared_otherwise(process, place / f"set-{run}", whole)
        replaced += _replacements(process)
        process.kill()
    note = f"workers replaced {replaced} times in {tries} runs; sets with other rows, and runs that hang: {len(faults)}"
    note += f"; the first: {faults[0]}" if faults else ""
    yield Finding("a data worker of prepare dies or hangs", replaced, len(faults), not faults and replaced > 0, note)


def _prepared_otherwise(process: Process, folder: Path, whole: Rows) -> Iterator[str]:
    try:
        if process.wait(_PATIENCE_S):
            yield " ".join(process.said.split())[-200:]
        elif rows_of(folder) != whole:
            yield "the set has other rows"
    except TimeoutError:
        yield "it hangs"


def _strike(pid: int, number: signal.Signals) -> bool:
    with contextlib.suppress(ProcessLookupError):
        if pid:
            os.kill(pid, number)
            return True
    return False
