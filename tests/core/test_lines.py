"""Files of lines outlive a full disk and a kill."""

from __future__ import annotations

from pathlib import Path

import pytest

from ip_adapter_trainer.core.lines import Lines


def refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, *args: object, **kwargs: object) -> object:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "open", full)


def test_lines_wait_while_the_disk_is_full_and_come_in_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = Lines(tmp_path / "new" / "lines.jsonl")
    lines.add("1\n")
    with monkeypatch.context() as full:
        refuse(full)
        lines.add("2\n")
        lines.add("3\n")
        assert lines.size_bytes == 6
    lines.add("4\n")
    assert lines.path.read_text() == "1\n2\n3\n4\n"
    told = [line for line in capsys.readouterr().err.splitlines() if "lines.jsonl" in line]
    assert len(told) == 2 and "No space left" in told[0] and "written again" in told[1]


def test_what_the_disk_took_half_of_is_ended_and_not_begun_again(tmp_path: Path) -> None:
    lines = Lines(tmp_path / "lines")
    lines.add("whole\n")
    lines._left, lines._is_midway = b"lf\n", True  # as a disk leaves it that took the first two letters
    with lines.path.open("a") as file:
        file.write("ha")
    lines.add("next\n")
    assert lines.path.read_text() == "whole\nhalf\nnext\n"


def test_a_line_that_a_kill_tore_spoils_no_other(tmp_path: Path) -> None:
    (tmp_path / "lines").write_text("whole\nto")
    Lines(tmp_path / "lines").add("next\n")
    assert (tmp_path / "lines").read_text() == "whole\nto\nnext\n"


@pytest.mark.parametrize(("size_bytes", "left"), [(4, "1\n2\n"), (0, ""), (99, "1\n2\n3\n")])
def test_a_file_is_cut_to_what_a_checkpoint_knows_of(tmp_path: Path, size_bytes: int, left: str) -> None:
    (tmp_path / "lines").write_text("1\n2\n3\nto")
    Lines(tmp_path / "lines").cut(size_bytes)
    assert (tmp_path / "lines").read_text() == left
