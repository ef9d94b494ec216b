"""Precision of frozen weights by its usual name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ip_adapter_trainer.core.errors import Problem, did_you_mean
from ip_adapter_trainer.core.log import say

if TYPE_CHECKING:
    import torch

NAMES = ("no", "fp16", "bf16")


def on_device(name: str, device_type: str) -> str:
    """The precision that a device can compute in: fp16 does not run on a CPU and becomes bf16 there, which is told.

    Raises:
        Problem: an unknown name.
    """
    if name not in NAMES:
        raise Problem(f"unknown precision {name!r}", where="--mixed_precision", remedy=did_you_mean(name, NAMES))
    if name == "fp16" and device_type == "cpu":
        say("fp16 does not run on a CPU: bf16 instead")
        return "bf16"
    return name


def dtype_of(name: str) -> torch.dtype:
    """The torch dtype of a precision."""
    import torch

    return {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[name]
