"""What a stop signal does, by when it comes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from ip_adapter_trainer.core import signals
from ip_adapter_trainer.core.signals import StopSignal

_LEAVES = """
import os, signal, time
from ip_adapter_trainer.core.signals import StopSignal
with StopSignal() as stop:
    {before}
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.5)
    print("lives")
"""


def exit_code(before: str) -> int:
    code = _LEAVES.format(before=before)
    return subprocess.run([sys.executable, "-c", code], capture_output=True).returncode


def test_before_there_is_anything_to_save_a_signal_leaves_at_once() -> None:
    assert exit_code("pass") == 143


def test_a_second_signal_leaves_at_once() -> None:
    assert (
        exit_code("noted = stop.noted(); noted.__enter__(); os.kill(os.getpid(), signal.SIGINT); time.sleep(2.5)")
        == 143
    )


def test_an_echo_of_a_launcher_is_no_second_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    with StopSignal() as stop, stop.noted():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.05)
        assert stop.asked == stop.received == signal.SIGTERM


def test_a_process_whose_launcher_is_gone_is_asked_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    stop = StopSignal()
    assert stop.asked is None
    monkeypatch.setattr(signals.os, "getppid", lambda: 1)
    assert stop.asked == signal.SIGTERM


def test_handlers_are_given_back() -> None:
    before = [signal.getsignal(number) for number in signals.WATCHED]
    with StopSignal():
        assert [signal.getsignal(number) for number in signals.WATCHED] != before
    assert [signal.getsignal(number) for number in signals.WATCHED] == before
