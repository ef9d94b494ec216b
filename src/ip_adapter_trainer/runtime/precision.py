"""Precision of frozen weights by its usual name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ip_adapter_trainer.core.errors import Problem, did_you_mean
from ip_adapter_trainer.core.log import say

if TYPE_CHECKING:
    import torch

NAMES = ("no", "fp16", "bf16")
_BF16_ARITHMETIC = ("amx_bf16", "avx512_bf16", "bf16")  # of Intel and AMD, and of ARM, by PyTorch's names


def on_device(name: str, device_type: str) -> str:
    """Return the precision to compute in on a device: fp16 does not run on a CPU and becomes bf16, and a line says so.

    A line also says that a CPU emulates bf16: frozen weights are half as large there, but a step takes longer.

    Raises:
        Problem: an unknown name.
    """
    if name not in NAMES:
        raise Problem(f"unknown precision {name!r}", where="--mixed_precision", remedy=did_you_mean(name, NAMES))
    if name == "fp16" and device_type == "cpu":
        say("fp16 does not run on a CPU: bf16 instead")
        name = "bf16"
    if name == "bf16" and device_type == "cpu" and not computes_bf16("cpu"):
        say("this CPU emulates bf16: fp32 is faster where its memory is enough (--mixed_precision no)")
    return name


def usual(device_type: str) -> str:
    """Return the precision that a device is given where none is asked for: bf16 where it computes that, else fp32."""
    return "bf16" if computes_bf16(device_type) else "no"


def in_words(name: str) -> str:
    """Return a precision as a run tells it, with the flag that would change it."""
    other = {"no": "fp32 (--mixed_precision bf16 halves them)", "bf16": "bf16 (fp32 by --mixed_precision no)"}
    return other.get(name, name)


def computes_bf16(device_type: str) -> bool:
    """Return whether a device has instructions for bf16, as far as PyTorch tells; of CPUs its older releases do not."""
    import torch

    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device_type != "cpu":
        return False
    tell = getattr(torch.cpu, "get_capabilities", None)
    return tell is None or any(tell().get(name) for name in _BF16_ARITHMETIC)


def dtype_of(name: str) -> torch.dtype:
    """Return the torch dtype of a precision."""
    import torch

    return {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[name]
