"""What the published training script leaves behind, and how the original classes read an adapter file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate.utils import save
from torch import Tensor, nn


class ImageProcessor(nn.Module):
    """A cross-attention processor that owns its pair, as the original code has it."""

    def __init__(self, width: int, context_dim: int) -> None:
        super().__init__()
        self.to_k_ip = nn.Linear(context_dim, width, bias=False)
        self.to_v_ip = nn.Linear(context_dim, width, bias=False)


class PlainProcessor(nn.Module):
    """A self-attention processor: no weights, but a place in the numbering."""


def with_processors(unet: nn.Module) -> nn.ModuleList:
    """Registers such processors in every attention layer of a UNet and lists them in its own order."""
    processors: dict[str, nn.Module] = {}
    for name in unet.attn_processors:  # type: ignore[union-attr]
        key = unet.get_submodule(name.removesuffix(".processor")).to_k
        is_cross = name.endswith("attn2.processor")
        processors[name] = ImageProcessor(key.out_features, key.in_features) if is_cross else PlainProcessor()
    unet.set_attn_processor(processors)  # type: ignore[operator]
    return nn.ModuleList(unet.attn_processors.values())  # type: ignore[union-attr]


class Trained(nn.Module):
    """The published script's module: the pairs are in it twice, in the UNet and in the list."""

    def __init__(self, unet: nn.Module, projector: nn.Module) -> None:
        super().__init__()
        self.unet, self.image_proj_model = unet, projector
        self.adapter_modules = with_processors(unet)

    def save(self, file: Path, *, prefix: str = "") -> dict[str, Mapping[str, Tensor]]:
        """Saves as `accelerator.save_state` does, with a wrapper's prefix; returns the tables that should be found."""
        state: Any = self.state_dict()
        for key in list(state):
            state[prefix + key] = state.pop(key)
        file.parent.mkdir(parents=True, exist_ok=True)
        save(state, file, safe_serialization=file.suffix == ".safetensors")
        return {"image_proj": self.image_proj_model.state_dict(), "ip_adapter": self.adapter_modules.state_dict()}
