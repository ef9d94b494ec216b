"""One side in a process of its own, which trains when it is its turn: memory does not come back within a process."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks import sizes
from benchmarks.our_step import OurStep
from benchmarks.published_step import PublishedStep
from benchmarks.rows import at_step, make_batch
from ip_adapter_trainer.core.log import quiet_loading
from ip_adapter_trainer.core.types import Batch, Encoded
from ip_adapter_trainer.prepare.config import SetConfig


@dataclass(frozen=True)
class Contender:
    """One side in one setting."""

    side: str  # published or ours
    precision: str  # no, fp16 or bf16
    size: str  # a name out of SIZES
    side_px: int
    images: int
    device: str
    techniques: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """A name for its files."""
        return "-".join((self.side, self.precision, *self.techniques))


@dataclass(frozen=True)
class Turn:
    """What a turn of steps took, and the process's peak since the run began."""

    seconds: float
    peak_bytes: int


class DoesNotFit(Exception):
    """The device's memory is too small."""


class Meter:
    """Time and peak memory of a device; for a CPU, the process's peak resident set."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._cuda = device, device.type == "cuda"
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if self._cuda else []
        self._began = 0.0

    def start(self) -> None:
        """Starts the watch once the device has nothing left to do."""
        if self._cuda:
            torch.cuda.synchronize(self._device)
            self._events[0].record()
        self._began = time.perf_counter()

    def stop(self) -> float:
        """Seconds since the start, with the device's work done."""
        if not self._cuda:
            return time.perf_counter() - self._began
        self._events[1].record()
        torch.cuda.synchronize(self._device)
        return self._events[0].elapsed_time(self._events[1]) / 1000

    def reset_peak(self) -> None:
        """Forgets the peak so far, freed memory given back first."""
        gc.collect()
        if self._cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")

    def peak_bytes(self) -> int:
        """The peak since it was last forgotten."""
        if self._cuda:
            return torch.cuda.max_memory_allocated(self._device)
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])

    def rest(self) -> None:
        """Leaves cached memory to the other side's process."""
        if self._cuda:
            torch.cuda.empty_cache()


class Child:
    """What the process of one side can be asked for."""

    def __init__(self, contender: Contender, folder: Path, pipe: Connection) -> None:
        quiet_loading()
        self.contender, self.folder, self._pipe = contender, folder, pipe
        device, size = torch.device(contender.device), sizes.SIZES[contender.size]
        self.meter, self._size = Meter(device), size
        if contender.precision == "no":  # a reference in fp32 is in fp32
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        nets, weights = sizes.build(size, device), sizes.projector_weights(size, device)
        self.ours = contender.side == "ours"
        self.step: Any = (
            OurStep(size, nets, weights, contender.precision, device, contender.techniques)
            if self.ours
            else PublishedStep(nets, weights, contender.precision, device)
        )
        self._make_batch(contender.images)

    def _make_batch(self, images: int) -> None:
        self.batch = make_batch(self._size, self.contender.side_px, images, self.contender.device)

    def encode(self) -> float:
        """Seconds to encode an image's target and prompt: in the step's batch, or in one of `ip-adapter prepare`."""
        batch = self.batch
        if self.ours:
            images = SetConfig.model_fields["encode_batch_size"].default
            batch = make_batch(self._size, self.contender.side_px, images, self.contender.device)
        self.meter.start()
        self.step.encode(batch)
        return self.meter.stop() / len(batch)

    def prepare(self) -> None:
        """Our side encodes its rows once and for all; the other side has nothing to prepare."""
        if self.ours:
            self.batch = replace(self.batch, picture=self.step.encode(self.batch))
            self.step.release_encoders()

    def gradients(self) -> str:
        """Writes the adapter's gradients for the batch; returns the file."""
        file = self.folder / f"{self.contender.label}.safetensors"
        found = {name: grad.cpu().contiguous() for name, grad in self.step.gradients(self.batch).items()}
        save_file(found, file)
        return str(file)

    def largest(self, candidates: tuple[int, ...]) -> int:
        """The largest of rising batch sizes that fits, which becomes the batch; 0: none does."""
        found, one = 0, self.batch
        for images in candidates:
            self._make_batch(images)
            if self.ours:  # any encoded row will do to see what fits
                assert isinstance(one.picture, Encoded)
                parts = (one.picture.moments, one.picture.features)
                moments, features = (t[:1].expand(images, *t.shape[1:]).contiguous() for t in parts)
                self.batch = replace(self.batch, picture=Encoded(moments, features))
            try:
                self.step.gradients(self.batch)
            except torch.cuda.OutOfMemoryError:
                break
            found, fits = images, self.batch
            self.meter.rest()
        self.batch = fits if found else one
        self.meter.rest()
        return found

    def run(self, steps: int) -> tuple[float, int]:
        """Trains turn by turn as told through the pipe, and saves; returns the save's seconds and bytes."""
        self.meter.reset_peak()
        output = self.folder / f"{self.contender.label}-output"
        seconds = self.step.run(self._turns(), len(self.batch), steps, output)
        return seconds, sum(f.stat().st_size for f in output.rglob("*") if f.is_file())

    def _turns(self) -> Iterator[Batch]:
        """Batches, as many as each message asks for: (untimed, timed). A turn ends when the next batch is asked for."""
        place = 0
        while True:
            untimed, timed = self._pipe.recv()
            for _ in range(untimed):
                yield at_step(self.batch, place := place + 1)
            self.meter.start()
            for _ in range(timed):
                yield at_step(self.batch, place := place + 1)
            seconds = self.meter.stop()
            self.meter.rest()
            self._pipe.send(Turn(seconds, self.meter.peak_bytes()))


def _serve(contender: Contender, folder: Path, pipe: Connection) -> None:
    log = os.open(folder / f"{contender.label}.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        child = Child(contender, folder, pipe)
        pipe.send("ready")
        while (command := pipe.recv()) is not None:
            name, arguments = command
            pipe.send(getattr(child, name)(*arguments))
    except torch.cuda.OutOfMemoryError as error:
        pipe.send(DoesNotFit(str(error).splitlines()[0]))
    except Exception:
        pipe.send(RuntimeError(traceback.format_exc()))


class Worker:
    """The parent's handle of one side's process.

    Usage::

        with Worker(contender, folder) as worker:
            worker.ask("prepare")
            worker.begin(steps=3)
            worker.turn(0, 2)
            worker.finish()
    """

    def __init__(self, contender: Contender, folder: Path) -> None:
        self.contender = contender
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(contender, folder, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self._is_ready = False

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.join()
        self._pipe.close()

    def _answer(self) -> Any:
        try:
            answer = self._pipe.recv()
        except EOFError:
            answer = RuntimeError(f"{self.contender.label} died (out of memory?)")
        if isinstance(answer, Exception):
            raise answer
        return answer

    def ask(self, name: str, *arguments: Any) -> Any:
        """What the child's method of that name returns.

        Raises:
            DoesNotFit: the device's memory is too small.
        """
        if not self._is_ready:
            self._is_ready = bool(self._answer())
        self._pipe.send((name, arguments))
        return self._answer()

    def begin(self, steps: int) -> None:
        """Starts a run of so many steps in all turns, and one more that `finish` gives."""
        self._pipe.send(("run", (steps + 1,)))

    def turn(self, untimed: int, timed: int) -> Turn:
        """Lets the run go on for some steps."""
        self._pipe.send((untimed, timed))
        return self._answer()

    def finish(self) -> tuple[float, int]:
        """The run's last step and its save: seconds and bytes of the save."""
        self._pipe.send((1, 0))
        return self._answer()
