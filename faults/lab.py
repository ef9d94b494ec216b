"""Where experiments are done: laid-out rows, real processes, and a watch on them from outside."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

from ip_adapter_trainer.core.settings import as_flags
from ip_adapter_trainer.pocket import world, write

PATIENCE_S = 180.0
_MARK = "IP_ADAPTER_TRAINER_LAB"  # in the environment of every process that a command starts
ROWS = 24

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Finding:
    """What one fault did.

    Attributes:
        fault: which, in words; one line of the report.
        tries: how often it was done.
        lost: in how many of them something was lost, let in or wrong.
        passed: None where the machine forbids the experiment.
        note: what was done, with the figures that matter; why it was left out.
        experiment: that found it, by its name.
    """

    fault: str
    tries: int
    lost: int
    passed: bool | None
    note: str
    experiment: str = ""


class Process:
    """A command in a session of its own, with everything that it starts.

    Usage::

        process = lab.start("train", settings)
        process.wait_until((output / "checkpoint-2").exists)
        process.send(signal.SIGTERM)
        assert process.wait(10) == 143, process.said
    """

    def __init__(self, argv: list[str], log: Path, environment: Mapping[str, str], folder: Path) -> None:
        self._log = log
        marked = {**environment, _MARK: str(log)}
        with log.open("wb") as out:
            self._popen = subprocess.Popen(
                argv, stdout=out, stderr=subprocess.STDOUT, env=marked, cwd=folder, start_new_session=True
            )
        self.pid = self._popen.pid

    @property
    def said(self) -> str:
        """Everything it and its children have printed so far."""
        return self._log.read_text(errors="replace")

    @property
    def runs(self) -> bool:
        """Whether it has not ended."""
        return self._popen.poll() is None

    def members(self) -> list[int]:
        """It and what it has started that lives on, launched processes in sessions of their own too (Linux only)."""
        mark = f"{_MARK}={self._log}".encode()
        found = []
        for environ in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):  # ended meanwhile, or another user's
                if mark in environ.read_bytes().split(b"\0"):
                    found.append(int(environ.parent.name))
        return found

    def children(self) -> list[int]:
        """The processes that it has itself started and that do not lie dead, by /proc."""
        return [pid for pid in self.members() if _parent_of(pid) == self.pid]

    def wait_until(
        self, happened: Callable[[], object], patience_s: float = PATIENCE_S, pause_s: float = 0.002
    ) -> bool:
        """Waits for something to be seen from outside; False if the process ended before it was.

        Raises:
            TimeoutError: neither came.
        """
        end = time.monotonic() + patience_s
        while not happened():
            if not self.runs:
                return bool(happened())
            if time.monotonic() > end:
                self.kill()
                raise TimeoutError(f"nothing happened in {patience_s:g} s; it said:\n{self.said[-2000:]}")
            time.sleep(pause_s)
        return True

    def send(self, number: int) -> None:
        """A signal to the process that was started, as a scheduler sends it."""
        if self.runs:
            self._popen.send_signal(number)

    def kill(self) -> None:
        """kill -9 to it and its children at once, as a machine that goes away."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        while others := self.members():  # those that `accelerate launch` started are in sessions of their own
            for pid in others:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self._popen.wait()

    def wait(self, patience_s: float = PATIENCE_S) -> int:
        """Its exit code.

        Raises:
            TimeoutError: it goes on for too long; it is killed.
        """
        try:
            return self._popen.wait(patience_s)
        except subprocess.TimeoutExpired as error:
            self.kill()
            raise TimeoutError(f"still running after {patience_s:g} s; it said:\n{self.said[-2000:]}") from error


def _parent_of(pid: int) -> int:
    """0 for one that has ended."""
    with contextlib.suppress(OSError):
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
        return int(parent) if state != "Z" else 0
    return 0


class Lab:
    """A folder to work in and the commands to try.

    Args:
        folder: empty or of an earlier lab.
        share: of the full number of tries, for a quick look.
        lanes: experiments of many tries may do so many side by side.
    """

    def __init__(self, folder: Path, share: float = 1.0, lanes: int = 1) -> None:
        self.folder, self.share, self.lanes = folder.resolve(), share, lanes
        self.folder.mkdir(parents=True, exist_ok=True)
        self._logs = count()  # threads may start processes side by side
        self._started: list[Process] = []

    def tries(self, full: int) -> int:
        """How often to try what the full lab tries so often."""
        return max(1, round(full * self.share))

    def place(self, name: str) -> Path:
        """A fresh, empty folder of an experiment."""
        taken = len(list(self.folder.glob(f"{name}-*")))
        folder = self.folder / f"{name}-{taken}"
        folder.mkdir()
        return folder

    @cached_property
    def pocket(self) -> Path:
        """The pocket base, its image encoder, and training rows."""
        folder = self.folder / "pocket"
        if not (folder / "data.json").exists():
            write.write_pocket(folder, rows=ROWS)
        return folder

    @property
    def inputs(self) -> dict[str, Any]:
        """Base, encoder and rows, as `train` and `prepare` take them."""
        here = self.pocket
        return {
            "pretrained_model_name_or_path": here / "base", "image_encoder_path": here / "image_encoder",
            "data_json_file": here / "data.json", "data_root_path": here / "images", "resolution": world.SIZE_PX,
        }  # fmt: skip

    def training(self, output: Path, **more: Any) -> dict[str, Any]:
        """Settings of a short run without validation, on all rows; keywords override."""
        short = {
            "output_dir": output, "train_batch_size": 2, "max_train_steps": 12, "save_steps": 1, "report_to": "none",
            "num_validation_images": 0, "grid_rows": 0, "validation_share": 0, "logging_steps": 1, "prepare": "off",
        }  # fmt: skip
        return {**self.inputs, **short, **more}

    def start(
        self,
        command: str,
        settings: Settings,
        *,
        operands: Sequence[object] = (),
        processes: int = 1,
        script: str = "ip_adapter_trainer",
        environment: Mapping[str, str] | None = None,
    ) -> Process:
        """Starts `ip-adapter COMMAND` in processes of its own.

        Args:
            command: train, prepare, export, check, ...; or a drop-in script's file.
            settings: its flags.
            operands: what it takes without a flag.
            processes: above one, under `accelerate launch`.
            script: the module to run; an observer may stand before the command.
            environment: variables beside the lab's own.
        """
        argv = [sys.executable, "-m", script] if processes == 1 else _launcher(processes, script)
        argv = [sys.executable, command] if command.endswith(".py") else [*argv, command]
        log = self.folder / f"log-{next(self._logs):04d}-{os.getpid()}.txt"
        environment = _environment() | dict(environment or {})
        process = Process([*argv, *map(str, operands), *as_flags(settings)], log, environment, self.folder)
        self._started.append(process)
        return process

    def run(self, command: str, settings: Settings, **how: Any) -> tuple[int, str]:
        """Runs a command to its end: exit code and what it said. See `start`."""
        process = self.start(command, settings, **how)
        return process.wait(), process.said

    def end(self) -> None:
        """Kills what still runs of all that was started."""
        for process in self._started:
            if process.runs:
                process.kill()
        self._started.clear()


def _launcher(processes: int, script: str) -> list[str]:
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes), "--multi_gpu"]
    return [*launch, "--mixed_precision", "no", "--main_process_port", "0", "--module", script]


def _environment() -> dict[str, str]:
    """One thread a process, fp32 on every machine, nothing fetched, and this checkout's modules."""
    root = str(Path(__file__).resolve().parents[1])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    own = {"OMP_NUM_THREADS": "1", "ACCELERATE_MIXED_PRECISION": "no", "HF_HUB_OFFLINE": "1"}
    return os.environ | own | {"PYTHONPATH": os.pathsep.join(paths)}
