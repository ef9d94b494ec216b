"""A terminal gets a bar, a log gets lines."""

from __future__ import annotations

import os
import termios
from contextlib import redirect_stderr, suppress

import pytest

from ip_adapter_trainer.runtime import progress
from ip_adapter_trainer.runtime.progress import Progress, spelled


def test_a_log_gets_lines_in_place_of_a_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "FIRST_S", 0.0)
    with Progress(400, "step", initial=119) as told:
        told.update(1, "loss 0.1234")
        told.update(1, "loss 0.5")  # too soon after the last line
        assert capsys.readouterr().err == "step 120 of 400, loss 0.1234, about 0 s left\n"
    assert capsys.readouterr().err == "step 121 of 400, loss 0.5, about 0 s left\n"


def test_the_end_is_told_once_and_nothing_where_nothing_was_done(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress(2, "picture") as told:
        told.update(2)
    with Progress(2, "picture"), Progress(2, "picture", shown=False) as hidden:
        hidden.update(2)
    assert capsys.readouterr().err == "picture 2 of 2, in 0 s\n"


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "FIRST_S", 0.0)
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    with os.fdopen(theirs, "w") as terminal, redirect_stderr(terminal), Progress(4, "step") as told:
        told.update(3, "loss 0.5")
        told.update(1, "loss 0.4")
    shown = ""
    with suppress(OSError):  # the end of what a terminal shows
        while True:
            shown += os.read(ours, 10_000).decode()
    assert "4/4" in shown and "loss 0.4" in shown and "step 4 of 4" not in shown


def test_times_are_spelled_as_people_say_them() -> None:
    assert [spelled(s) for s in (0.4, 42, 99.6, 200, 9000)] == ["0 s", "42 s", "2 min", "3 min", "2.5 h"]
