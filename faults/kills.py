"""kill -9 of training: while it saves, and at any moment of its life."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from faults.chains import Pace, Stages, Victim, attack, differing
from faults.lab import Finding, Lab, Process
from ip_adapter_trainer.storage.checkpoints import all_checkpoints, verified
from ip_adapter_trainer.train.checkpoint import TENSORS, WEIGHTS

STEPS = 12
_MOST_SAVES = 4  # of one process before it is killed
_LOST = "torn checkpoints, failed restarts, last bytes (adapter, optimizer, EMA, metrics) unlike the unbroken run's"


@dataclass(frozen=True)
class _Unbroken:
    """A run that nothing disturbed, and how it is started."""

    lab: Lab
    folder: Path
    processes: int
    settings: Mapping[str, Any]
    pace: Pace

    @classmethod
    def of(cls, lab: Lab, processes: int, **settings: Any) -> _Unbroken:
        """Does the run."""
        folder = lab.place("kills")
        output = folder / "unbroken"
        flags = lab.training(output, **settings)
        pace = Pace.of(lambda: lab.start("train", flags, processes=processes), Stages(output))
        return cls(lab, folder, processes, settings, pace)

    def victims(self, *, saving: bool) -> Callable[[], _Training]:
        """Gives runs of the same settings, to be killed while they save or at any moment."""
        numbers = count()
        return lambda: _Training(self, self.folder / f"chain-{next(numbers)}", saving=saving)


class _Training(Victim):
    """A run that is resumed again and again."""

    def __init__(self, unbroken: _Unbroken, output: Path, *, saving: bool) -> None:
        super().__init__(Stages(output))
        self._unbroken, self._output, self._saving = unbroken, output, saving
        self._had_good = False

    def start(self) -> Process:
        lab, settings = self._unbroken.lab, self._unbroken.settings
        flags = lab.training(self._output, resume_from_checkpoint="latest", **settings)
        return lab.start("train", flags, processes=self._unbroken.processes)

    def moment(self, process: Process, rng: random.Random) -> bool:
        if self._saving:
            return self._unbroken.pace.moment_of_writing(process, rng, self.stages, _MOST_SAVES)
        return self._unbroken.pace.moment(process, rng)

    def after_kill(self) -> Iterator[str]:
        whole = [verified(folder) for folder in all_checkpoints(self._output)]
        yield from ["a torn checkpoint" for is_whole in whole if not is_whole]
        if self._had_good and not any(whole):
            yield "no good checkpoint any more"
        self._had_good = self._had_good or any(whole)

    def after_end(self) -> Iterator[str]:
        names = [f"checkpoint-{STEPS}/{WEIGHTS}", f"checkpoint-{STEPS}/{TENSORS}", "metrics.jsonl"]
        yield from differing(self._output, self._unbroken.folder / "unbroken", names)
        yield from [f"{name} was not swept" for name in self.stages.now()]


def during_saves(lab: Lab) -> Iterator[Finding]:
    """Kills while a checkpoint is written or an old one removed, with a checkpoint at every step."""
    unbroken = _Unbroken.of(lab, 1, max_train_steps=STEPS, save_steps=1, checkpoints_total_limit=2, use_ema=True)
    tally = attack(lab, lab.tries(200), unbroken.victims(saving=True))
    yield tally.finding("kill -9 during a save", _LOST)


def anywhere(lab: Lab) -> Iterator[Finding]:
    """Kills at any moment: imports, loading, steps, validation, saving; in one process and in two."""
    for processes, kills in ((1, 80), (2, 20)):
        unbroken = _Unbroken.of(
            lab, processes, max_train_steps=STEPS, save_steps=2, checkpoints_total_limit=2, use_ema=True,
            validation_steps=6, num_validation_images=2, grid_rows=1, grid_steps=2,
        )  # fmt: skip
        tally = attack(lab, lab.tries(kills), unbroken.victims(saving=False))
        what = "one process" if processes == 1 else f"{processes} processes"
        yield tally.finding(f"kill -9 anywhere, {what}", f"a whole life is {unbroken.pace.life_s:.0f} s; {_LOST}")
