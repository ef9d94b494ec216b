"""Short hashes of the frozen models, by which a resumed run sees that one was exchanged under the same name.

A few weights of every tensor are looked at, not all: a base that was trained further differs in nearly all of them,
and reading a few takes milliseconds where reading all takes seconds.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import torch
from torch import nn

from ip_adapter_trainer.model import Model

SAMPLES = 16  # of each tensor
_SAYS_NOTHING = ("_class_name", "_diffusers_version", "_name_or_path", "_use_default_values")


def hash_models(model: Model) -> dict[str, str]:
    """Hash each frozen module's sampled weights and dtype, by its name, and the scheduler's settings."""
    encoders = {f"{role}_encoder": encoder.model for role, encoder in model.encoders.items()}
    parts = {**model.denoiser.pipeline.components, **encoders}
    model_hashes = {name: _of_weights(part) for name, part in parts.items() if isinstance(part, nn.Module)}
    settings = dict(model.denoiser.pipeline.scheduler.config)
    told = {name: value for name, value in settings.items() if name not in _SAYS_NOTHING}
    scheduler = f"settings:{_hash(json.dumps(told, sort_keys=True, default=str).encode())}"
    return model_hashes | {"scheduler": scheduler}


def compared(old: Mapping[str, str], new: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Return the parts that changed, and those whose hashes cannot be compared since they were loaded differently."""
    both = [name for name in new if name in old and old[name] != new[name]]
    changed = [name for name in both if old[name].partition(":")[0] == new[name].partition(":")[0]]
    return changed, [name for name in both if name not in changed]


@torch.no_grad()
def _of_weights(module: nn.Module) -> str:
    """The way in which it was loaded (dtypes, number of tensors), a colon, and the hash."""
    tensors = [tensor.detach() for _, tensor in sorted(module.named_parameters())]
    parts = []
    for tensor in tensors:  # at most SAMPLES of its numbers, evenly spread over its order
        places = torch.linspace(0, tensor.numel() - 1, min(SAMPLES, tensor.numel()), device=tensor.device).long()
        parts.append(tensor[torch.unravel_index(places, tensor.shape)].float())  # no copy, whatever the layout
    sampled = torch.cat(parts).cpu()
    dtypes = "+".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}))
    return f"{dtypes} x {len(tensors)}:{_hash(sampled.numpy().tobytes())}"


def _hash(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()
