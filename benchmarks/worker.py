"""One side in a process of its own, which trains when it is its turn: memory does not come back within a process."""

from __future__ import annotations

import ctypes
import gc
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks import sizes
from benchmarks.aside import Process
from benchmarks.our_step import OurStep, Settings
from benchmarks.pictures import Files, raw_batches
from benchmarks.published_step import PublishedStep
from benchmarks.rows import at_step, make_batch
from ip_adapter_trainer.core.log import quiet_loading
from ip_adapter_trainer.core.values import Batch, Encoded, map_tensors


@dataclass(frozen=True)
class Contender:
    """One side in one setting."""

    side: str  # published or ours
    precision: str  # no, fp16 or bf16
    size: str  # a name out of SIZES
    side_px: int
    images: int
    device: str
    settings: Settings = field(default_factory=dict)  # of our side, where they are not the defaults

    @property
    def label(self) -> str:
        """A name for its files."""
        setting = self.size, str(self.side_px), str(self.images)
        return "-".join((self.side, self.precision, *setting, *(f"{k}={v}" for k, v in self.settings.items())))


@dataclass(frozen=True)
class Order:
    """What a turn is to be."""

    untimed: int  # steps
    timed: int
    saves: bool = False  # after the middle one; steps go on, also beyond `timed`, until all is written
    reads: bool = False  # from the prepared set on the disk, not the given batch


@dataclass(frozen=True)
class Turn:
    """What a turn was, and the process's peak since the run began."""

    seconds: float
    steps: int
    waited_s: float  # of these seconds, for batches
    peak_bytes: int


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
            OurStep(size, nets, weights, contender.precision, device, contender.settings)
            if self.ours
            else PublishedStep(nets, weights, contender.precision, device)
        )
        self._make_batch(contender.images)

    def _make_batch(self, images: int) -> None:
        self.batch = make_batch(self._size, self.contender.side_px, images, self.contender.device)

    def prepare_pictures(self, files: Files) -> float:
        """Seconds to make of a picture file what a step trains on: as in the published step, or by our `prepare`."""
        return self._prepare_set(files) if self.ours else self._read_and_encode(files)

    def _prepare_set(self, files: Files) -> float:
        self._files, self._set = files, self.folder / f"{self.contender.label}-set"
        shutil.rmtree(self._set, ignore_errors=True)
        job = self.step.preparation(files, self._set)
        self.meter.start()
        self.step.prepare(job)
        return self.meter.stop() / files.count

    def _read_and_encode(self, files: Files) -> float:
        """Half as many pictures do: however many they are, each takes the same time."""
        images, device = self.contender.images, torch.device(self.contender.device)
        steps = max(files.count // 2 // images, 1)
        self.meter.start()
        batches = raw_batches(files, images, self._size.image["image_size"], pin=device.type == "cuda")
        for _ in range(steps):
            self.step.encode(next(batches).to(device))
        return self.meter.stop() / (steps * images)

    def prepare(self) -> None:
        """Our side encodes the given batch once and for all; the other side has nothing to prepare."""
        if self.ours:
            self.batch = replace(self.batch, inputs=self.step.encode(self.batch))
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
                assert isinstance(one.inputs, Encoded)
                self.batch = replace(self.batch, inputs=map_tensors(partial(_repeated, images), one.inputs))
            try:
                self.step.try_step(self.batch)
            except torch.cuda.OutOfMemoryError:
                break
            found, fits = images, self.batch
            self.meter.rest()
        self.batch = fits if found else one
        self.meter.rest()
        return found

    def run(self) -> int:
        """Trains turn by turn as told through the pipe; returns the bytes of the last checkpoint."""
        self.meter.reset_peak()
        output = self.folder / f"{self.contender.label}-output"
        checkpoint = self.step.run(self._turns(output), len(self.batch), output)
        size_bytes = sum(f.stat().st_size for f in checkpoint.rglob("*") if f.is_file())
        shutil.rmtree(output, ignore_errors=True)
        return size_bytes

    def _turns(self, output: Path) -> Iterator[Batch]:
        """Batches, as many as each order asks for, until there is none. A turn ends when the next one is asked for."""
        given = (at_step(self.batch, place) for place in count(1))
        while (order := self._pipe.recv()) is not None:
            batches = given
            if order.reads:
                batches = self.step.prepared_batches(self._files, self._set, len(self.batch), output)
            for _ in range(order.untimed):
                yield next(batches)
            yield from self._timed(order, batches)

    def _timed(self, order: Order, batches: Iterator[Batch]) -> Iterator[Batch]:
        steps, waited_s = 0, 0.0
        self.meter.start()
        while steps < order.timed or self.step.is_writing:
            self.step.saves = order.saves and steps == (order.timed - 1) // 2
            began = time.perf_counter()
            batch = next(batches)
            waited_s += time.perf_counter() - began
            yield batch
            steps += 1
        seconds = self.meter.stop()
        self.step.saves = False
        self.meter.rest()
        self._pipe.send(Turn(seconds, steps, waited_s, self.meter.peak_bytes()))


def _repeated(images: int, tensor: Tensor) -> Tensor:
    """The first of [B, ...], so many times."""
    return tensor[:1].expand(images, *tensor.shape[1:]).contiguous()


def _serve(pipe: Connection, contender: Contender, folder: Path) -> None:
    log = os.open(folder / f"{contender.label}.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    child = Child(contender, folder, pipe)
    while True:
        name, arguments = pipe.recv()
        pipe.send(getattr(child, name)(*arguments))


class Worker(Process):
    """The parent's handle of one side's process.

    Usage::

        with Worker(contender, folder) as worker:
            worker.ask("prepare")
            worker.begin()
            worker.turn(Order(untimed=0, timed=2))
            worker.finish()
    """

    def __init__(self, contender: Contender, folder: Path) -> None:
        self.contender = contender
        super().__init__(_serve, contender, folder)

    def ask(self, name: str, *arguments: Any) -> Any:
        """What the child's method of that name returns; raises as `answer`."""
        self.send((name, arguments))
        return self.answer()

    def begin(self) -> None:
        """Starts the training."""
        self.send(("run", ()))

    def turn(self, order: Order) -> Turn:
        """Lets the training go on for some steps."""
        self.send(order)
        return self.answer()

    def finish(self) -> int:
        """Ends the training; the bytes of its last checkpoint, where there is one."""
        self.send(None)
        return self.answer()
