"""What a stop signal does, by when it comes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ip_adapter_trainer.runtime import signals
from ip_adapter_trainer.runtime.signals import StopSignal, interruptible

_LEAVES = """
import os, signal, time
from ip_adapter_trainer.runtime.signals import StopSignal
with StopSignal("nothing yet") as stop:
    {before}
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.5)
    print("lives")
"""
_NOTED = "noted = stop.noted(); noted.__enter__()"
_TOLD = "stopping: what was done is saved first; another signal leaves at once\n"


def ending(code: str, **variables: str) -> tuple[int, str]:
    """Exit code and what was said."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | variables)
    return done.returncode, done.stdout + done.stderr


def test_before_there_is_anything_to_save_a_signal_leaves_at_once() -> None:
    assert ending(_LEAVES.format(before="pass")) == (143, "stopped: nothing yet\n")
    assert ending(_LEAVES.format(before="pass"), RANK="1") == (143, "")


def test_after_there_was_something_no_word_says_that_there_was_nothing() -> None:
    assert ending(_LEAVES.format(before=f"{_NOTED}; noted.__exit__(None, None, None)")) == (143, "stopped\n")


def test_a_second_signal_leaves_at_once() -> None:
    second = "stopped at once, by a second signal: what was not saved yet is lost\n"
    before = f"{_NOTED}; os.kill(os.getpid(), signal.SIGINT); time.sleep(2.5)"
    assert ending(_LEAVES.format(before=before)) == (143, _TOLD + second)


def test_a_worker_that_hears_it_too_says_nothing() -> None:
    forked = f"{_NOTED}; child = os.fork(); child and os.wait(); child and os._exit(0)"
    assert ending(_LEAVES.format(before=forked)) == (0, "lives\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_a_module_is_imported_leaves_without_a_trace(tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "slow.py").write_text(
        f"import os\ntry: os.kill(os.getpid(), {int(number)})\nexcept BaseException: print('taken for its own')"
    )
    code = "from ip_adapter_trainer.runtime.signals import interruptible\nwith interruptible(): import slow"
    assert ending(code, PYTHONPATH=f"{os.environ.get('PYTHONPATH', '')}:{tmp_path}") == (
        128 + number,
        "stopped while loading\n",
    )


def test_a_signal_at_work_is_raised_with_its_number() -> None:
    with interruptible(), pytest.raises(KeyboardInterrupt) as raised:
        signal.raise_signal(signal.SIGTERM)
    assert raised.value.args == (signal.SIGTERM,)


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
