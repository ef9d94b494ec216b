"""Files of lines outlive a full disk and a kill: what was refused is written later, whole and in order."""

from __future__ import annotations

from pathlib import Path

import pytest

from ip_adapter_trainer.storage.lines import Lines
from tests.disks import limited


def test_lines_wait_until_the_disk_takes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = list[str]()
    monkeypatch.setattr("ip_adapter_trainer.storage.lines.say", said.append)
    file = tmp_path / "log" / "lines.jsonl"
    lines = Lines(file)
    lines.add("first\n")
    with limited(9):  # in the middle of the second line
        lines.add("second\n")
        assert file.read_text() == "first\nsec" and lines.size_bytes == len("first\nsecond\n")
        lines.add("third\n")
        assert lines.size_bytes == len("first\nsecond\nthird\n")
    lines.add("fourth\n")
    assert file.read_text() == "first\nsecond\nthird\nfourth\n"
    assert ["is not written" in line for line in said] == [True, False] and "is written again" in said[1]


def test_a_folder_that_vanished_is_made_again(tmp_path: Path) -> None:
    lines = Lines(tmp_path / "log" / "lines.jsonl")
    lines.add("first\n")
    lines.path.unlink()
    lines.path.parent.rmdir()
    lines.add("second\n")
    assert lines.path.read_text() == "second\n"


@pytest.mark.parametrize(("size", "left"), [(6, "first\n"), (13, "first\nsecond\n"), (99, "first\nsecond\n"), (0, "")])
def test_what_goes_beyond_is_taken_back_wherever_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, left: str
) -> None:
    monkeypatch.setattr("ip_adapter_trainer.storage.lines.say", lambda line: None)  # pytest writes too
    written, waiting = Lines(tmp_path / "written"), Lines(tmp_path / "waiting")
    written.add("first\nsecond\n")
    written.cut(size)
    with limited(8):
        waiting.add("first\nsecond\n")
        waiting.cut(size)
    waiting.add("")
    assert written.path.read_text() == waiting.path.read_text() == left


def test_a_line_that_a_kill_tore_spoils_no_other(tmp_path: Path) -> None:
    (tmp_path / "lines").write_text("whole\nto")
    Lines(tmp_path / "lines").add("next\n")
    assert (tmp_path / "lines").read_text() == "whole\nto\nnext\n"
