"""A run that is stopped, killed or resumed ends with the same bytes as one that never was."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from ip_adapter_trainer.core.errors import NotFiniteProblem, Problem, Stopped
from ip_adapter_trainer.core.values import Batch
from ip_adapter_trainer.runtime import precision
from ip_adapter_trainer.runtime.launch import Runtime
from ip_adapter_trainer.storage.checkpoints import all_checkpoints, newest, verified
from ip_adapter_trainer.train import checkpoint, starting
from ip_adapter_trainer.train.config import PUBLISHED
from ip_adapter_trainer.train.step import Step
from ip_adapter_trainer.train.step_metrics import PendingMetrics

COMPARED = (checkpoint.WEIGHTS, checkpoint.TENSORS)


def same_bytes(a: Path, b: Path) -> bool:
    return a.read_bytes() == b.read_bytes()


def assert_same_run(a: Path, b: Path, last: int) -> None:
    for name in COMPARED:
        assert same_bytes(a / f"checkpoint-{last}" / name, b / f"checkpoint-{last}" / name), name
    assert same_bytes(a / "metrics.jsonl", b / "metrics.jsonl")


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def start(arguments: list[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "ip_adapter_trainer", "train", *arguments]
    return subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(path: Path, process: subprocess.Popen[str], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.02)


@pytest.mark.parametrize("extra", [{}, {"use_ema": True, "gradient_accumulation_steps": 2, "lr_scheduler": "cosine"}])
def test_resuming_gives_the_same_bytes(run: Callable, tmp_path: Path, extra: dict[str, object]) -> None:
    whole = run(tmp_path / "whole", validation_steps=2, **extra)
    broken = tmp_path / "broken"
    shutil.copytree(whole, broken)
    shutil.rmtree(broken / "checkpoint-4")
    run(broken, validation_steps=2, resume_from_checkpoint="latest", **extra)
    assert_same_run(whole, broken, 4)


def test_a_killed_run_goes_on_as_if_nothing_had_happened(run: Callable, flags: Callable, tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", max_train_steps=30, save_steps=5)
    killed = tmp_path / "killed"
    arguments = flags(killed, max_train_steps=30, save_steps=5)
    process = start(arguments)
    wait_for(killed / "checkpoint-10", process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    run(killed, max_train_steps=30, save_steps=5, resume_from_checkpoint="latest")
    assert_same_run(whole, killed, 30)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_exits(
    run: Callable, flags: Callable, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    output = tmp_path / "out"
    process = start(flags(output, max_train_steps=100_000, save_steps=5))
    wait_for(output / "checkpoint-5", process)
    process.send_signal(number)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == code
    last = newest(output, verified)
    assert last is not None
    step = last.name.split("-")[1]
    told = f"stopped at step {step}, saved {last.name}; go on by the same command with --resume_from_checkpoint latest"
    assert out.splitlines()[-1] == told and "stopping: " in out
    assert f"step {step} of 100000, loss" in out and "step/s" not in out, "lines, and no bar"
    steps = len((output / "metrics.jsonl").read_text().splitlines())
    assert last.name == f"checkpoint-{steps}", "the step at which it stopped was saved"


LONG = {"gradient_accumulation_steps": 50, "max_train_steps": 2, "save_steps": 1}  # a step takes seconds


def test_a_step_of_many_micro_batches_is_broken_off_and_done_again(
    run: Callable, flags: Callable, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    process = start(flags(output, **LONG))
    wait_for(output / "checkpoint-1", process)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=10) == 143
    last = newest(output, verified)
    assert last is not None and last.name == "checkpoint-1", "it did not wait for the second step"
    run(output, resume_from_checkpoint="latest", **LONG)
    assert_same_run(run(tmp_path / "whole", **LONG), output, 2)


def test_a_step_that_one_process_breaks_off_is_taken_by_none(flags: Callable, tmp_path: Path) -> None:
    output = tmp_path / "out"
    process = launched(flags(output, **LONG))
    wait_for(output / "checkpoint-1", process)
    time.sleep(0.3)
    second = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[1]
    os.kill(int(second), signal.SIGTERM)
    out, _ = process.communicate(timeout=20)
    last = newest(output, verified)
    assert last is not None and last.name == "checkpoint-1", out[-3000:]
    assert out.count("stopped at step 1, saved checkpoint-1") == 1
    finish(launched(flags(output, resume_from_checkpoint="latest", **LONG)))
    whole = tmp_path / "whole"
    finish(launched(flags(whole, **LONG)))
    assert_same_run(whole, output, 2)


def test_a_step_that_another_process_broke_off_is_not_taken(
    run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where this process had all its micro batches before it could hear of it."""
    told = iter([0, 0, 2])
    with monkeypatch.context() as patched:
        patched.setattr(Runtime, "highest", lambda self, number: max(number, next(told)))
        with pytest.raises(Stopped):
            run(tmp_path / "out", use_ema=True, save_steps=9)
    assert [folder.name for folder in all_checkpoints(tmp_path / "out")] == ["checkpoint-2"]
    run(tmp_path / "out", use_ema=True, save_steps=9, resume_from_checkpoint="latest")
    assert_same_run(run(tmp_path / "whole", use_ema=True, save_steps=9), tmp_path / "out", 4)


def _meet(rank: int, address: str, folder: str) -> None:
    """Tells what two processes heard of each other, and whether they are a group after a run, a stop, an error."""
    group = torch.distributed
    told = []
    for ending in (None, Stopped(143), RuntimeError("of one process alone")):
        group.init_process_group("gloo", init_method=f"{address}/{type(ending).__name__}", rank=rank, world_size=2)
        with suppress(Stopped, RuntimeError):
            hosts = group.new_group(backend="gloo")
            with Runtime(Accelerator(cpu=True), rank, 2, torch.device("cpu"), "no", hosts=hosts) as runtime:
                told.append([runtime.highest(pair[rank]) for pair in [(0, 0), (0, 2), (1, 0)]])
                told[-1].append(runtime.shared(7 + rank))
                if ending:
                    raise ending
        told.append(group.is_initialized())
    group.destroy_process_group()
    (Path(folder) / str(rank)).write_text(str(told))


def test_processes_hear_the_highest_of_their_numbers_and_leave(tmp_path: Path) -> None:
    """After an error, which may be of one alone, the group of devices is kept: its way out waits for the others."""
    torch.multiprocessing.spawn(_meet, (f"file://{tmp_path}", str(tmp_path)), nprocs=2)
    heard = [0, 2, 1, 7]
    told = str([heard, False, heard, False, heard, True])
    assert [(tmp_path / str(rank)).read_text() for rank in (0, 1)] == [told] * 2


def test_training_leaves_its_group(run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[object] = []
    monkeypatch.setattr(Runtime, "__exit__", lambda *ending: left.append(ending[1]))
    run(tmp_path / "out", max_train_steps=1)
    assert left == [None]


def test_a_signal_before_the_first_step_is_done_leaves_no_checkpoint(flags: Callable, tmp_path: Path) -> None:
    output = tmp_path / "out"
    process = start(flags(output, **LONG | {"gradient_accumulation_steps": 10_000}))
    wait_for(output / "config.yaml", process)
    time.sleep(3)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=10)
    assert process.returncode == 143 and newest(output, lambda folder: True) is None
    assert "nothing was trained or saved yet; run the same command again" in out


def launched(arguments: list[str]) -> subprocess.Popen[str]:
    """Two processes of the drop-in script, as the published command line starts them, in a session of their own."""
    script = Path(__file__).parents[2] / "examples" / "ip_adapter" / "tutorial_train_ip-adapter.py"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--multi_gpu"]
    command = [*launch, "--mixed_precision", "no", "--main_process_port", "0", str(script), *arguments]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=environment(), start_new_session=True, **pipes)


def finish(process: subprocess.Popen[str]) -> None:
    out, _ = process.communicate()
    assert process.returncode == 0, out[-3000:]


def test_two_processes_train_what_one_does_with_the_doubled_batch(
    run: Callable, flags: Callable, tmp_path: Path
) -> None:
    # Steps follow the gradient and do not blow up its rounding; the script that is launched has a recipe of its own.
    plain = PUBLISHED | {"adam_epsilon": 1.0, "learning_rate": 1.0}
    one = run(tmp_path / "one", train_batch_size=4, **plain)
    two = tmp_path / "two"
    finish(launched(flags(two, train_batch_size=2, **plain)))
    a, b = (torch.load(p / "checkpoint-4" / checkpoint.WEIGHTS, weights_only=True) for p in (one, two))
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-5, atol=1e-6)


def test_rows_of_a_bad_step_are_named_from_every_process(flags: Callable, tmp_path: Path) -> None:
    process = launched(flags(tmp_path / "out", learning_rate=1e30, max_train_steps=9, max_grad_norm=1e9,
                             save_steps=100))  # fmt: skip
    out, _ = process.communicate()
    assert "step 6: not finite, step skipped (5 in a row)" in out, out[-3000:]
    skipped = [line for line in out.splitlines() if "step skipped" in line]
    assert len(skipped) == 5 and all(line.count("data.json, element ") == 4 for line in skipped)


def test_bad_steps_are_counted_across_a_resume(
    run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    honest = Step.__call__
    monkeypatch.setattr(Step, "__call__", lambda self, batch: honest(self, batch) * float("nan"))
    output = run(tmp_path / "out", max_train_steps=3)
    with pytest.raises(NotFiniteProblem, match="5 steps in a row"):
        run(output, max_train_steps=9, resume_from_checkpoint="latest")
    counted = [line.split("(")[1].split()[0] for line in capsys.readouterr().err.splitlines() if "skipped" in line]
    assert counted == ["1", "2", "3", "4", "5"]


@pytest.mark.parametrize("finite", [True, False], ids=["finite", "with_bad_steps"])
def test_learning_of_a_step_late_changes_no_byte(
    run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finite: bool
) -> None:
    """As on a GPU, where the host reads a step's numbers while the next one runs."""
    honest = Step.__call__
    bad = () if finite else (2, 3)

    def some_bad(self: Step, batch: Batch) -> torch.Tensor:
        step = int(batch.index[0]) // 2 + 1
        return honest(self, batch) * (float("nan") if step in bad else 1.0)

    monkeypatch.setattr(Step, "__call__", some_bad)
    settings = {"max_train_steps": 6, "save_steps": 4, "validation_steps": 3, "use_ema": True}
    prompt = run(tmp_path / "prompt", **settings)
    own = PendingMetrics.__init__

    def late(self: PendingMetrics, device: torch.device) -> None:
        own(self, device)
        self.late = 1

    monkeypatch.setattr(PendingMetrics, "__init__", late)
    assert_same_run(prompt, run(tmp_path / "late", **settings), 6)


def test_a_step_that_is_not_finite_changes_neither_weights_nor_moments(
    run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Step.__call__

    def second_bad(self: Step, batch: Batch) -> torch.Tensor:
        return honest(self, batch) * (float("nan") if int(batch.index[0]) == 2 else 1.0)

    monkeypatch.setattr(Step, "__call__", second_bad)
    output = run(tmp_path / "out", max_train_steps=2, save_steps=1)
    one, two = (checkpoint.read(output / f"checkpoint-{step}") for step in (1, 2))
    assert all(torch.equal(one.weights[key], two.weights[key]) for key in one.weights)
    for number, moments in one.state["optimizer"].items():
        assert all(torch.equal(moments[key], two.state["optimizer"][number][key]) for key in moments)


def test_an_output_folder_with_checkpoints_is_not_overwritten(run: Callable, tmp_path: Path) -> None:
    output = run(tmp_path / "out", max_train_steps=2)
    with pytest.raises(Problem, match="another run's checkpoints"):
        run(output, max_train_steps=2)


def test_a_damaged_newest_checkpoint_is_passed_over(run: Callable, tmp_path: Path) -> None:
    output = run(tmp_path / "out")
    file = output / "checkpoint-4" / checkpoint.TENSORS
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    last = newest(output, verified)
    assert last is not None and last.name == "checkpoint-2"
    with pytest.raises(Problem, match="damaged"):
        checkpoint.read(output / "checkpoint-4")


@pytest.mark.parametrize("began", ["bf16", None], ids=["bf16", "a version with fp32 as its usual"])
def test_a_run_whose_precision_nobody_names_goes_on_in_its_own(
    began: str | None,
    run: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    monkeypatch.setattr(precision, "computes_bf16", lambda device_type: True)
    output = run(tmp_path / "out")
    assert "frozen weights bf16" in capsys.readouterr().err
    assert checkpoint.read(output / "checkpoint-4").state["config"]["mixed_precision"] == "bf16"
    if began is None:
        monkeypatch.setattr(starting, "starting_point", partial(as_of_old, starting.starting_point))
    monkeypatch.setattr(precision, "computes_bf16", lambda device_type: False)
    run(output, resume_from_checkpoint="latest", max_train_steps=5)
    assert f"frozen weights {began or 'fp32'}" in capsys.readouterr().err


def as_of_old(find: Callable, config: object) -> Any:
    point = find(config)
    return replace(point, state={**point.state, "config": {**point.state["config"], "mixed_precision": None}})
