"""Kills in the lab: a writer that is careful loses nothing, one that is not is found out, and what is torn is seen."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from faults import files
from faults.chains import Pace, Stages, Victim, attack, differing
from faults.lab import Lab, Process
from ip_adapter_trainer.cache.index import IMAGES

KILLS = 3
WHOLE = "whole" * 10
WRITER = """
import os, sys, time
final, written, text, waits_s = sys.argv[1:]
with open(written, "w") as out:
    out.write(text[:25])
    out.flush()
    open(final + ".begun", "w").close()
    time.sleep(float(waits_s))
    out.write(text[25:])
os.replace(written, final)
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the lab finds processes by /proc")


class _Writer(Victim):
    """Writes a file under another name first, or carelessly under its own; waits in the middle for its kills."""

    def __init__(self, folder: Path, *, careful: bool = True, kills: int = KILLS, text: str = WHOLE) -> None:
        super().__init__(Stages(folder))
        self._folder, self._file, self._kills, self._text = folder, folder / "file", kills, text
        self._careful, self._written = careful, self._file
        self._begun = folder / "file.begun"

    def start(self) -> Process:
        self._begun.unlink(missing_ok=True)
        if self._careful:
            self._written = self._folder / f".file.{self._kills}.staged"
        waits_s, self._kills = (60 if self._kills else 0), self._kills - 1
        what = map(str, [self._file, self._written, self._text, waits_s])
        return Process([sys.executable, "-c", WRITER, *what], self._folder / "log.txt", os.environ, self._folder)

    def moment(self, process: Process, rng: random.Random) -> bool:
        return process.wait_until(self._begun.exists)

    def after_kill(self) -> Iterator[str]:
        if self._file.is_file() and self._file.read_text() != WHOLE:
            yield "half a file"

    def after_end(self) -> Iterator[str]:
        if self._file.read_text() != WHOLE:
            yield "another file"


class _KilledWhileWriting(_Writer):
    """Is killed as soon as it writes."""

    def moment(self, process: Process, rng: random.Random) -> bool:
        return Pace(life_s=0, write_s=0).moment_of_writing(process, rng, self.stages, most=1)

    def after_kill(self) -> Iterator[str]:
        if not self._written.exists():
            yield "killed before it wrote"


def test_kills_of_a_careful_writer_lose_nothing(tmp_path: Path) -> None:
    tally = attack(Lab(tmp_path), KILLS, lambda: _Writer(tmp_path))
    assert (tally.kills, tally.ends, tally.faults) == (KILLS, 1, []) and tally.left == {"half written": KILLS}
    assert tally.finding("kills", "lost").passed


def test_every_kill_of_a_careless_writer_is_a_loss(tmp_path: Path) -> None:
    (tmp_path / ".older.staged").touch()  # which none of these kills left
    tally = attack(Lab(tmp_path), KILLS, lambda: _Writer(tmp_path, careful=False))
    finding = tally.finding("kills", "lost")
    assert tally.faults == ["half a file"] * KILLS and tally.left == {"": KILLS}
    assert finding.passed is False and finding.lost == KILLS and finding.note.endswith("the first: half a file")


def test_what_an_earlier_command_left_is_no_writing_that_has_begun(tmp_path: Path) -> None:
    (tmp_path / ".older.staged").touch()
    tally = attack(Lab(tmp_path), KILLS, lambda: _KilledWhileWriting(tmp_path))
    assert tally.faults == [] and tally.left == {"half written": KILLS}


def test_an_end_that_is_another_is_a_loss(tmp_path: Path) -> None:
    tally = attack(Lab(tmp_path), 1, lambda: _Writer(tmp_path, kills=1, text="other" * 10))
    assert tally.faults == ["another file"]


def test_a_restart_that_fails_is_a_loss(tmp_path: Path) -> None:
    (tmp_path / "file").mkdir()  # which no file replaces
    (fault,) = attack(Lab(tmp_path), 1, lambda: _Writer(tmp_path, kills=1)).faults
    assert fault.startswith("exit 1: ") and fault.endswith("/file'")


def test_missing_and_other_files_differ(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for folder, text in ((one, "a"), (other, "b")):
        folder.mkdir()
        (folder / "same").write_text("same")
        (folder / "changed").write_text(text)
    (one / "new").touch()
    assert list(differing(one, other, ["same", "changed", "new"])) == ["changed differs", "new is missing"]


def _prepared(folder: Path, table: str = "moments/8x8x8-float32", byte: int = 0, value: int = 1) -> Path:
    """A set of one row, all zero but for one byte."""
    shard = folder / table / "a.safetensors"
    shard.parent.mkdir(parents=True)
    row = torch.zeros(1, 48, dtype=torch.uint8)
    row[0, byte] = value
    save_file({"key": torch.zeros(1, 16, dtype=torch.uint8), "value": row}, shard)
    return shard


@pytest.mark.parametrize(
    ("table", "byte", "same"),
    [(IMAGES.folder, 16, True), (IMAGES.folder, 24, False), ("moments/8x8x8-float32", 16, False)],
)
def test_rows_differ_by_every_byte_but_when_pictures_were_read(
    table: str, byte: int, same: bool, tmp_path: Path
) -> None:
    for value in (1, 2):
        _prepared(tmp_path / str(value), table, byte, value)
    assert (files.rows_of(tmp_path / "1") == files.rows_of(tmp_path / "2")) is same


def test_torn_shards_and_adapters_are_not_whole_ones(tmp_path: Path) -> None:
    shard = _prepared(tmp_path)
    rows, content = files.rows_of(tmp_path), files.content_of(shard)
    shard.write_bytes(shard.read_bytes()[:-1])
    assert list(files.rows_of(tmp_path).values()) == [b"torn"] != list(rows.values())
    assert files.content_of(shard) == ({}, {"state": "torn"}) != content
