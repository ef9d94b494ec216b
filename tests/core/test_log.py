"""What is told to people never ends a run, wherever it goes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FULL = Path("/dev/full")  # a disk that takes nothing

TOLD = """
import sys, warnings
from tqdm import tqdm
from ip_adapter_trainer import cli
from ip_adapter_trainer.core.errors import StorageProblem
from ip_adapter_trainer.core.log import say

def run(argv):
    for _ in tqdm(range(3), mininterval=0):
        say("a line")
    warnings.warn("a warning")
    print("to be seen")
    raise StorageProblem("the end")

sys.exit(cli.guarded(run, []))
"""


@pytest.mark.skipif(not FULL.exists(), reason="this system has no such device")
def test_a_log_on_a_full_disk_changes_neither_the_run_nor_its_exit_code() -> None:
    with FULL.open("wb") as full:
        done = subprocess.run([sys.executable, "-c", TOLD], stdout=subprocess.PIPE, stderr=full, text=True)
    assert done.returncode == 4 and done.stdout == "to be seen\n"


def test_a_log_whose_reader_is_gone_does_not_either() -> None:
    process = subprocess.Popen([sys.executable, "-c", TOLD], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stderr is not None
    process.stderr.close()
    assert process.wait(60) == 4


def test_what_can_be_told_is_told() -> None:
    done = subprocess.run([sys.executable, "-c", TOLD], capture_output=True, text=True)
    assert done.stderr.count("a line") == 3 and "error: the end" in done.stderr and "a warning" in done.stderr
