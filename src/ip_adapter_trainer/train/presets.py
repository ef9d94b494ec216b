"""The settings for which `--low_memory` stands, by a base model's family and a card's GB, measured by
benchmarks/memory_budget.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ip_adapter_trainer.core.settings import Part

_SD = {"mixed_precision": "bf16", "prepare": "auto"}
_SDXL = _SD | {"encode_batch_size": 1, "train_batch_size": 1}
_SDXL_RECOMPUTED = _SDXL | {"gradient_checkpointing": True, "use_8bit_adam": True, "prepare_text": True}

PRESETS: Mapping[str, Mapping[int, Mapping[str, Any]]] = {
    "sd": {
        8: _SD | {"encode_batch_size": 4, "train_batch_size": 4},
        12: _SD | {"train_batch_size": 8},
        24: _SD | {"train_batch_size": 16},
    },
    "sdxl": {
        8: _SDXL_RECOMPUTED | {"quantize": "nf4"},
        12: _SDXL_RECOMPUTED | {"quantize": "int8"},
        24: _SDXL,
    },
}


def chosen(config: Part, family: str, memory_gb: int) -> str:
    """Return a line that tells what became of the settings for which `--low_memory` stands."""
    settings = {name: getattr(config, name) for name in PRESETS[family][memory_gb]}
    return f"low_memory {memory_gb}: " + ", ".join(f"{name} {value}" for name, value in settings.items())
