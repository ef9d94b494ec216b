"""What a full disk refuses of a growing file is written later, whole and in order."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ip_adapter_trainer.core.errors import StorageProblem
from ip_adapter_trainer.core.lines import Lines
from ip_adapter_trainer.core.storage import told_as_storage


@contextmanager
def limited(size_bytes: int) -> Iterator[None]:
    """No file grows beyond a size: what fits of a write is taken, as on a disk that fills up."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_lines_wait_until_the_disk_takes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = list[str]()
    monkeypatch.setattr("ip_adapter_trainer.core.lines.say", said.append)
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
    monkeypatch.setattr("ip_adapter_trainer.core.lines.say", lambda line: None)  # the limit is for pytest's files too
    written, waiting = Lines(tmp_path / "written"), Lines(tmp_path / "waiting")
    written.add("first\nsecond\n")
    written.cut(size)
    with limited(8):
        waiting.add("first\nsecond\n")
        waiting.cut(size)
    waiting.add("")
    assert written.path.read_text() == waiting.path.read_text() == left


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EIO])
def test_a_disk_that_refuses_is_a_problem_of_storage(code: int) -> None:
    with pytest.raises(StorageProblem, match=os.strerror(code)) as caught, told_as_storage():
        raise OSError(code, os.strerror(code), "/there")
    assert caught.value.exit_code == 4 and caught.value.where == "/there"


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(FileNotFoundError), told_as_storage():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "/there")
