"""Requests that `accelerate launch` makes by the environment: done, told or refused, and never dropped in silence.

Done elsewhere: the CPU and CPU affinity (accelerate itself).
"""

from __future__ import annotations

import os

from ip_adapter_trainer.core.errors import Problem
from ip_adapter_trainer.core.log import say

_STEPS = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
_OTHER_WAYS = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}


def launched_precision() -> str | None:
    """Return the precision that the environment asks for; None: it says nothing of it."""
    return os.environ.get("ACCELERATE_MIXED_PRECISION")


def accumulation_steps() -> int | None:
    """Return the micro batches of a step that the environment asks for; None: it says nothing of them."""
    asked = os.environ.get(_STEPS, "")
    return int(asked) if asked.isdecimal() else None


def demand_same_accumulation(steps: int) -> None:
    """Demand the micro batches of a step that the environment asks for, if it does.

    Raises:
        Problem: it asks for others than a flag or a settings file.
    """
    asked = accumulation_steps()
    if asked not in (None, steps):
        what = f"{steps} micro batches a step are set, and the launcher asks for {asked}"
        raise Problem(what, where=f"--gradient_accumulation_steps, {_STEPS}", remedy="leave out one of the two")


def demand_one_way() -> None:
    """Refuse to share weights out over processes; tell of a compiler's backend, which is left to `--compile`.

    Raises:
        Problem: the launcher asks for DeepSpeed or its like.
    """
    for name, way in _OTHER_WAYS.items():
        if os.environ.get(name, "").lower() == "true":
            what = f"the launcher asks for {way}, and here every process holds all weights"
            remedy = "launch with --multi_gpu in its place; --quantize and --gradient_checkpointing save memory"
            raise Problem(what, where=f"accelerate launch ({name})", remedy=remedy)
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend.lower() != "no":
        say(f"the launcher's dynamo backend {backend.lower()} is not used: --compile on compiles the denoiser's blocks")


def judge_alone(device_type: str) -> None:
    """Tell of processes that were asked for and not started: accelerate starts one where there are no two GPUs.

    It then sets the address of a group, and no size of it.

    Raises:
        Problem: there may be one on each of several machines, which would each train a run of its own.
    """
    if "MASTER_ADDR" not in os.environ or "WORLD_SIZE" in os.environ:
        return
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true":
        what = "this process is alone: with --cpu, accelerate starts one on each machine, and they never meet"
        remedy = "put --multi_gpu in place of --cpu, which needs no GPU here; for one process alone, unset MASTER_ADDR"
        raise Problem(what, where="accelerate launch", remedy=remedy)
    if "ACCELERATE_MIXED_PRECISION" in os.environ:
        way = "; add --multi_gpu, which starts them on a CPU too" if device_type == "cpu" else ""
        say(f"accelerate was asked for several processes and started one, as it found no two GPUs{way}")
