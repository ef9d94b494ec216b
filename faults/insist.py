"""Signals that insist, and launchers that die: what a polite stop does not wait for, or never hears of."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from faults.lab import Finding, Lab
from ip_adapter_trainer.runtime.signals import ECHO_S
from ip_adapter_trainer.storage.checkpoints import newest, verified

LIMIT_S = 10.0
AT_ONCE_S = 1.0
_IMAGES = 10_000  # of a micro batch, for which a first signal waits


def insisting(lab: Lab) -> Iterator[Finding]:
    """A second signal in a step that lasts; a launcher that goes without its processes."""
    yield _second_signal(lab)
    yield _dead_launcher(lab)


def _second_signal(lab: Lab) -> Finding:
    tries, lost, longest_s = 0, 0, 0.0
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1) * lab.tries(2):
        output = lab.place("insist") / "out"
        process = lab.start("train", lab.training(output, train_batch_size=_IMAGES))
        process.wait_until((output / "config.yaml").exists)
        time.sleep(2)
        process.send(number)
        time.sleep(ECHO_S + 0.5)
        stayed, began = process.runs, time.monotonic()
        process.send(number)
        code, took_s = process.wait(), time.monotonic() - began
        tries, longest_s = tries + 1, max(longest_s, took_s)
        lost += not (stayed and code == 128 + number and took_s <= AT_ONCE_S)
    note = f"SIGTERM, SIGINT, SIGUSR1 twice in a micro batch of {_IMAGES:,} images: gone {longest_s:.1f} s "
    note += f"after the second at the longest (limit {AT_ONCE_S:.0f}), exit 143, 130, 138"
    return Finding("a second signal", tries, lost, not lost, note)


def _steps(output: Path) -> int:
    file = output / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def _has_steps(output: Path, least: int) -> bool:
    return _steps(output) >= least


def _dead_launcher(lab: Lab) -> Finding:
    tries, lost, longest_s = 0, 0, 0.0
    for number in (signal.SIGUSR1, signal.SIGKILL) * lab.tries(2):
        output = lab.place("insist") / "out"
        endless = lab.training(output, max_train_steps=100_000, save_steps=100_000)
        process = lab.start("train", endless, processes=2)
        process.wait_until(partial(_has_steps, output, least=3))
        process.send(number)
        began = time.monotonic()
        while process.members() and time.monotonic() - began < 3 * LIMIT_S:
            time.sleep(0.1)
        took_s, last = time.monotonic() - began, newest(output, verified)
        process.kill()
        tries, longest_s = tries + 1, max(longest_s, took_s)
        lost += last is None or last.name != f"checkpoint-{_steps(output)}" or took_s > LIMIT_S
    note = "SIGUSR1, which it does not pass on, and SIGKILL to `accelerate launch` alone: its two processes save their "
    note += f"step and are gone in {longest_s:.1f} s at the longest (limit {LIMIT_S:.0f})"
    return Finding("a launcher dies", tries, lost, not lost, note)
