"""Several machines: one launcher on each, and one run over all of them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ip_adapter_trainer.config import parse_train
from ip_adapter_trainer.core.errors import LostProblem, Problem
from ip_adapter_trainer.core.log import say_after
from ip_adapter_trainer.manifest.manifest import read_alike, read_manifest
from ip_adapter_trainer.runtime.launch import Runtime, start
from ip_adapter_trainer.train.config import PUBLISHED
from ip_adapter_trainer.train.starting import StartingPoint, agreed_starting_point
from tests.train.test_resume import assert_same_run, environment, finish, launched, wait_for


def machines(arguments: list[str]) -> list[subprocess.Popen[str]]:
    """One launcher of one process for each of two machines, both here, in sessions of their own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
    launch += ["--master_addr", "127.0.0.1", "--master_port", str(port)]
    script = ["-m", "ip_adapter_trainer", "train", *arguments]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return [
        subprocess.Popen(
            [*launch, "--node_rank", str(rank), *script], env=environment(), start_new_session=True, **pipes
        )
        for rank in (0, 1)
    ]


def switch_off(launcher: subprocess.Popen[str]) -> None:
    """Kills a launcher and its process, as where a machine is gone."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    for process in (launcher.pid, *map(int, children)):
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def test_a_run_that_loses_a_machine_is_resumed_and_ends_as_that_of_one_machine(flags: Callable, tmp_path: Path) -> None:
    spec = PUBLISHED | {"max_train_steps": 24, "save_steps": 4}  # the script that is launched has it by itself
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finish(launched(flags(whole, **spec)))
    arguments = flags(broken, **spec)
    first, second = machines(arguments)
    wait_for(broken / "checkpoint-8", first)
    switch_off(second)
    told, _ = first.communicate(timeout=120)
    assert "another process of the run is gone" in told and "--resume_from_checkpoint latest" in told, told[-3000:]
    assert "bug:" not in told and not (broken / "checkpoint-24").exists()
    for launcher in machines([*arguments, "--resume_from_checkpoint=latest"]):
        finish(launcher)
    assert_same_run(whole, broken, 24)


@pytest.fixture
def second(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    """The second of two processes; the first meets no problem."""
    monkeypatch.setattr(Runtime, "gathered", lambda self, own: [None, own])
    return Runtime(None, 1, 2, torch.device("cpu"), "no")


def test_a_checkpoint_of_one_machine_is_told_with_what_to_do(
    flags: Callable, tmp_path: Path, second: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = StartingPoint(tmp_path / "of-the-first" / "checkpoint-8", 8, {})
    monkeypatch.setattr(Runtime, "shared", lambda self, own: there)
    with pytest.raises(Problem, match="this one does not have it") as caught:
        agreed_starting_point(parse_train(flags(tmp_path / "out")), second)
    assert (
        str(there.folder) in caught.value.fault.where and "a disk that all machines share" in caught.value.fault.remedy
    )


def test_machines_that_read_other_rows_are_refused(
    flags: Callable, tmp_path: Path, second: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = parse_train(flags(tmp_path / "out"))
    mine = read_manifest(config).fingerprint
    values = iter([[None, None], [replace(mine, sha256="other"), mine]])
    monkeypatch.setattr(Runtime, "gathered", lambda self, own: next(values))
    with pytest.raises(Problem, match="rank 1 reads other rows than rank 0"):
        read_alike(config, second)


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (RuntimeError("[/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer"), LostProblem),
        (torch.distributed.DistBackendError("NCCL error"), LostProblem),
        (RuntimeError("of its own"), RuntimeError),
    ],
)
def test_a_library_that_misses_another_process_is_no_bug(error: Exception, raised: type[Exception]) -> None:
    accelerator = SimpleNamespace(state=SimpleNamespace(destroy_process_group=lambda group: None))
    with pytest.raises(raised) as caught, Runtime(accelerator, 1, 2, torch.device("cpu"), "no"):
        raise error
    assert type(caught.value) is raised


def test_processes_that_accelerate_starts_alone_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `accelerate launch --cpu --num_processes 2` starts them."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    with pytest.raises(Problem, match="this process is alone") as caught:
        start(mixed_precision=None, local_rank=-1, output_dir=str(tmp_path), logging_dir="")
    assert "--multi_gpu" in caught.value.fault.remedy


def test_waiting_is_told_once_it_is_long(capsys: pytest.CaptureFixture[str]) -> None:
    with say_after(0.0, "waiting"):
        for _ in range(100):
            if told := capsys.readouterr().err:
                break
            time.sleep(0.01)
    with say_after(60.0, "never"):
        pass
    assert told == "waiting\n" and not capsys.readouterr().err
