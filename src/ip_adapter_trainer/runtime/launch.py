"""From launcher to runtime: processes, device, precision. One place that knows accelerate's launch conventions."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from ip_adapter_trainer.core.errors import LostProblem, Problem, Stopped, first_line
from ip_adapter_trainer.core.log import say_after
from ip_adapter_trainer.runtime.launcher import demand_one_way, judge_alone, launched_precision
from ip_adapter_trainer.runtime.precision import dtype_of, on_device, usual
from ip_adapter_trainer.storage.disk import as_storage_problem
from ip_adapter_trainer.storage.staging import lock, sweep

T = TypeVar("T")

_MOST_WORKERS = 8
_PATIENCE_S = 30.0  # until the others are asked for; torch itself gives up after half an hour
_AGAIN = "see what the others said; start all processes again, with --resume_from_checkpoint latest if it trained"


@dataclass(frozen=True)
class Runtime:
    """The process that this is, its device, and the other processes of the command."""

    accelerator: Any
    rank: int
    world: int
    device: torch.device
    precision: str  # no, fp16 or bf16
    local_rank: int = 0  # among the processes of this machine
    local_world: int = 1
    hosts: Any = None  # a group of the processes' hosts, where the first group is that of their devices

    def portion(self, count: int) -> range:
        """Return this process's part of `count` things that the processes of each machine share."""
        begin, end = (count * (self.local_rank + i) // self.local_world for i in (0, 1))
        return range(begin, end)

    def data_workers(self, asked: int | None, *, encoded: bool = False) -> int:
        """Return how many processes read rows for this one: those asked for, else what cores beside a GPU allow.

        Rows that are `encoded` are read as quickly without.
        """
        if asked is not None or encoded or self.device.type == "cpu":
            return asked or 0
        return max(0, min(_MOST_WORKERS, core_count() // self.local_world - 1))

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the frozen weights."""
        return dtype_of(self.precision)

    @property
    def is_main(self) -> bool:
        """True in the process that writes."""
        return self.rank == 0

    def gathered(self, value: T) -> list[T]:
        """Return the values of all processes, by rank; every process must call it."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(values, value, group=self.hosts)
        return values

    def barrier(self) -> None:
        """Wait for every process."""
        if self.world > 1:
            self.accelerator.wait_for_everyone()

    def total(self, number: int) -> int:
        """Return the sum of every process's number."""
        if self.world == 1:
            return number
        return int(self.accelerator.reduce(torch.tensor(number, device=self.device), reduction="sum"))

    def highest(self, number: int) -> int:
        """Return the greatest of every process's numbers; the hosts exchange them, so no device is waited for."""
        if self.world == 1:
            return number
        told = torch.tensor(number)
        torch.distributed.all_reduce(told, op=torch.distributed.ReduceOp.MAX, group=self.hosts)
        return int(told)

    def shared(self, value: T) -> T:
        """Return the first process's value on every process; each must call it."""
        if self.world == 1:
            return value
        box = [value]
        torch.distributed.broadcast_object_list(box, group=self.hosts)
        return box[0]

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """Raise a problem that any process meets in this block on all of them, once all have left it.

        No collective may be in it: the processes that meet no problem would wait there for those that do.

        Raises:
            Problem: there is one.
        """
        problem = None
        try:
            yield
        except Problem as found:
            problem = found
        self.agree(problem)

    def agree(self, problem: Problem | None) -> None:
        """Raise a problem that any process found on every process, so that none waits for another.

        Raises:
            Problem: there is one.
        """
        found = [(rank, other) for rank, other in enumerate(self.gathered(problem)) if other]
        if problem:
            raise problem
        for rank, other in found:
            raise other.but(what=f"{other.fault.what} (found by rank {rank})")

    def __enter__(self) -> Runtime:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Leaves the groups: one of their threads that met the interpreter's end would abort the process.

        The way out of a group of devices is a collective, and of most errors the others know nothing: then it is kept.
        """
        if self.world == 1:
            return
        together = error is None or isinstance(error, Stopped)
        self.accelerator.state.destroy_process_group(None if together else self.hosts)
        if error is not None and _is_loss(error):
            what = f"another process of the run is gone: {first_line(error).split('. ')[0]}"
            raise LostProblem(what, where=f"rank {self.rank} of {self.world}", remedy=_AGAIN) from error


def _is_loss(error: BaseException) -> bool:
    """Return whether a library says that another process did not answer; gloo does so without a class of its own."""
    is_gloo = isinstance(error, RuntimeError) and "/gloo/" in str(error)
    return is_gloo or isinstance(error, torch.distributed.DistError)


def _accelerator(trackers: Sequence[str], output_dir: str, logging_dir: str) -> Any:
    """An Accelerator whose group is real: without a GPU, several processes meet over gloo.

    `accelerate launch --multi_gpu` on a machine without a GPU starts processes that each believe to be alone; the
    launcher's own WORLD_SIZE tells the truth.
    """
    from accelerate import Accelerator
    from accelerate.utils import ProjectConfiguration

    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    project = ProjectConfiguration(project_dir=output_dir, logging_dir=os.path.join(output_dir, logging_dir))  # noqa: PTH118
    cpu = not alone and not torch.cuda.is_available()
    return Accelerator(mixed_precision="no", cpu=cpu, log_with=list(trackers) or None, project_config=project)


def start(
    *, mixed_precision: str | None, local_rank: int, trackers: Sequence[str] = (), output_dir: str, logging_dir: str
) -> Runtime:
    """Join the group of processes that the launcher started, or run alone.

    Raises:
        Problem: the launcher started several processes and they do not form one group, or it asks for what is not done.
    """
    demand_one_way()
    if local_rank >= 0:
        os.environ.setdefault("LOCAL_RANK", str(local_rank))
    world = int(os.environ.get("WORLD_SIZE", "1"))
    waiting = (
        f"waiting for the {world} processes of this run to meet: see on every machine that they started, and that none "
        "ended with an error of its own, such as a model that its machine lacks"
    )
    try:
        with say_after(_PATIENCE_S, waiting):
            accelerator = _accelerator(trackers, output_dir, logging_dir)
    except ValueError as error:  # a variable of the group is missing
        what = f"cannot join the other processes: {first_line(error)}"
        raise Problem(what, where="the launcher", remedy="start with accelerate launch, or torchrun") from error
    except RuntimeError as error:
        if not _is_loss(error):
            raise
        what = f"the {world} processes of this run did not meet: {first_line(error)}"
        raise LostProblem(what, where=f"rank {os.environ.get('RANK')}", remedy=_AGAIN) from error
    if accelerator.num_processes != world:
        what = f"{world} processes were launched but this one sees {accelerator.num_processes}"
        raise Problem(what, where="accelerate launch", remedy="launch with torchrun, or as many GPUs as processes")
    device = accelerator.device
    if world == 1:
        judge_alone(device.type)
    precision = on_device(mixed_precision or launched_precision() or usual(device.type), device.type)
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # a launcher that does not tell: nothing is shared
    local_rank, local_world = (accelerator.local_process_index, local_world) if local_world > 1 else (0, 1)
    hosts = torch.distributed.new_group(backend="gloo") if world > 1 and device.type != "cpu" else None
    rank = accelerator.process_index
    return Runtime(accelerator, rank, world, device, precision, local_rank, local_world, hosts)


def core_count() -> int:
    """Return the number of cores that this process may use, which may be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def claimed(folder: Path, runtime: Runtime, flag: str = "--output_dir") -> Iterator[None]:
    """Hold a folder for this run in this block: the first process makes it and clears what a killed run left in it.

    Raises:
        Problem: another run holds it.
        StorageProblem: the disk refuses.
    """
    held = None
    with runtime.agreed():
        if runtime.is_main:
            with as_storage_problem():
                folder.mkdir(parents=True, exist_ok=True)
                held = lock(folder, flag)
            sweep(folder)
    try:
        yield
    finally:
        if held:
            held.release()
