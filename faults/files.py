"""kill -9 of the commands that write files for others: `prepare` and `export`."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from faults.chains import Pace, Stages, Victim, attack
from faults.lab import Finding, Lab, Process
from ip_adapter_trainer.cache.index import IMAGES

_TABLES = "*/*"  # where a prepared set has its shards
_FILE = "adapter.safetensors"
_READ_AT = slice(16, 24)  # the bytes of a picture's record that tell when it was read

Rows = dict[tuple[str, bytes], bytes]
Content = tuple[dict[str, bytes], dict[str, str]]


class _Writer(Victim):
    """A command that is killed half the time while it writes, else at any moment."""

    most_files = 1  # that a process may write before it is killed

    def __init__(self, command: Callable[[], Process], stages: Stages, pace: Pace) -> None:
        super().__init__(stages)
        self._command, self._pace = command, pace

    def start(self) -> Process:
        return self._command()

    def moment(self, process: Process, rng: random.Random) -> bool:
        if rng.random() < 0.5:
            return self._pace.moment_of_writing(process, rng, self.stages, self.most_files)
        return self._pace.moment(process, rng)


def rows_of(folder: Path) -> Rows:
    """Every row of a prepared set, by table and address, but for the times at which pictures were read."""
    rows: Rows = {}
    for shard in sorted(folder.glob(f"{_TABLES}/[!.]*.safetensors")):
        table = str(shard.parent.relative_to(folder))
        try:
            tensors = load_file(shard)
        except SafetensorError:
            rows[table, shard.name.encode()] = b"torn"
            continue
        values = tensors["value"].reshape(len(tensors["key"]), -1).view(torch.uint8).numpy()
        if table == IMAGES.folder:
            values[:, _READ_AT] = 0
        for key, value in zip(tensors["key"].numpy(), values, strict=True):
            rows[table, key.tobytes()] = value.tobytes()
    return rows


def content_of(file: Path) -> Content:
    """Tensors and metadata of an adapter file, in no order: safetensors writes metadata otherwise every time."""
    try:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        return {name: tensor.view(torch.uint8).numpy().tobytes() for name, tensor in load_file(file).items()}, metadata
    except SafetensorError:
        return {}, {"state": "torn"}


class _Preparing(_Writer):
    """A set that is filled again and again, beside one that was filled at once."""

    most_files = 4

    def __init__(self, command: Callable[[], Process], folder: Path, pace: Pace, whole: Rows) -> None:
        super().__init__(command, Stages(folder, _TABLES), pace)
        self._folder, self._whole = folder, whole

    def after_kill(self) -> Iterator[str]:
        if not rows_of(self._folder).items() <= self._whole.items():
            yield "a row is not what it must be"

    def after_end(self) -> Iterator[str]:
        if rows_of(self._folder) != self._whole:
            yield "the set has other rows"
        yield from [f"{name} was not swept" for name in self.stages.now()]


class _Exporting(_Writer):
    """A checkpoint that is exported again and again under one name."""

    def __init__(self, command: Callable[[], Process], file: Path, pace: Pace, whole: Content) -> None:
        super().__init__(command, Stages(file.parent), pace)
        self._file, self._whole = file, whole

    def after_kill(self) -> Iterator[str]:
        if self._file.exists() and content_of(self._file) != self._whole:
            yield "half a file under the final name"

    def after_end(self) -> Iterator[str]:
        if content_of(self._file) != self._whole:
            yield "the file differs"
        yield from [f"{name} was not swept" for name in self.stages.now()]


def preparing(lab: Lab) -> Iterator[Finding]:
    """Kills of `prepare`, which goes on where it was."""
    place, numbers = lab.place("preparing"), count()

    def command(folder: Path) -> Callable[[], Process]:
        """Fills a set."""
        return partial(lab.start, "prepare", {**lab.inputs, "prepared_dir": folder, "prepare_text": True})

    pace = Pace.of(command(place / "unbroken"), Stages(place / "unbroken", _TABLES))
    whole = rows_of(place / "unbroken")

    def make() -> _Preparing:
        """An empty set."""
        folder = place / f"chain-{next(numbers)}"
        return _Preparing(command(folder), folder, pace, whole)

    tally = attack(lab, lab.tries(20), make)
    yield tally.finding("kill -9 of prepare", f"{len(whole)} rows of a set, other or missing ones at the end")


def exporting(lab: Lab) -> Iterator[Finding]:
    """Kills of `export` over a file that it wrote before, or over none."""
    place, numbers = lab.place("exporting"), count()
    code, said = lab.run("train", lab.training(place / "run", max_train_steps=2, save_steps=2))
    assert code == 0, said

    def command(folder: Path) -> Callable[[], Process]:
        """Exports the checkpoint."""
        folder.mkdir()
        settings = {"output": folder / _FILE, "overwrite": True}
        return partial(lab.start, "export", settings, operands=[place / "run" / "checkpoint-2"])

    pace = Pace.of(command(place / "unbroken"), Stages(place / "unbroken"))
    whole = content_of(place / "unbroken" / _FILE)

    def make() -> _Exporting:
        """A folder without a file."""
        folder = place / f"chain-{next(numbers)}"
        return _Exporting(command(folder), folder / _FILE, pace, whole)

    tally = attack(lab, lab.tries(20), make)
    yield tally.finding("kill -9 of export", "files under the final name that are not whole, not the unbroken one's")
