"""The forms of files in which an adapter's two tables are found."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from torch import Tensor

from ip_adapter_trainer.adapter_files.raw import RawFile
from ip_adapter_trainer.adapters import shapes_of
from ip_adapter_trainer.core.errors import Problem
from ip_adapter_trainer.layouts import LAYOUTS, Layout, make_layout

Origin = Literal["published", "comfy", "checkpoint", "rescued"]

# Where the projector and the layers stand in each form, by prefix.
_PREFIXES: dict[Origin, tuple[str, str]] = {
    "published": ("image_proj.", "ip_adapter."),
    "comfy": ("image_proj.", "adapter_modules."),
    "checkpoint": ("image_proj_model.", "adapter_modules."),
    # Saved by the published script: its pairs were dropped as duplicates of the ones registered in the UNet.
    "rescued": ("image_proj_model.", "unet."),
}
_PROCESSOR = re.compile(r"(?P<layer>.+)\.processor\.(?P<weight>.+)")
_LAYER = re.compile(
    r"(down_blocks|up_blocks|mid_block)\.(?:([0-9]{1,3})\.)?attentions\.([0-9]{1,3})"
    r"\.transformer_blocks\.([0-9]{1,3})\.attn2"
)
_ORDER = {"down_blocks": 0, "up_blocks": 1, "mid_block": 2}  # module order of diffusers' UNet


@dataclass(frozen=True)
class Tables:
    """The projector's and the layers' tensors under their published names."""

    origin: Origin
    image_proj: dict[str, Tensor]
    ip_adapter: dict[str, Tensor]
    layout: Layout
    layers: dict[int, str] = field(default_factory=dict)  # N to the UNet's layer, where the file names layers


def tables_of(raw: RawFile, named: str | None) -> Tables:
    """Find the two tables, whatever the file's form, and the layout whose layer weights these are, which checks them.

    Args:
        raw: the file.
        named: the layout that a card names; None: it is told by the names.

    Raises:
        Problem: no known form, with what was found; or weights that no reader could place.
    """
    for origin, (projector, pairs) in _PREFIXES.items():
        image_proj, ip_adapter = (_under(prefix, raw.tensors) for prefix in (projector, pairs))
        if not image_proj or not (ip_adapter or named):
            continue
        layers: dict[int, str] = {}
        if origin == "rescued":
            ip_adapter, layers = _renumber(ip_adapter, raw.path)
        shapes = shapes_of(ip_adapter)
        owner = next((name for name, entry in LAYOUTS.items() if entry().owns(shapes)), "unet")  # says what is wrong
        layout = make_layout(named or owner)
        layout.demand(ip_adapter, str(raw.path))
        _check_weights({**image_proj, **ip_adapter}, raw.path)
        return Tables(origin, image_proj, ip_adapter, layout, layers)
    what = f"this is no adapter file that this trainer knows: it holds {_found(raw)}"
    raise Problem(what, where=str(raw.path), remedy="give an adapter file, a checkpoint-N folder or a run's folder")


def _found(raw: RawFile) -> str:
    """List in short what a file holds: the first parts of its tensors' names, with counts."""
    counts = Counter({"unet": raw.frozen} if raw.frozen else {})
    counts.update(name.split(".")[0] for name in raw.tensors)
    shown = [f"{head} ({count})" for head, count in counts.items()]
    more = [f"and {len(shown) - 6} more"] if len(shown) > 6 else []
    return ", ".join(shown[:6] + more) or "no tensors"


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _renumber(processors: Mapping[str, Tensor], path: Path) -> tuple[dict[str, Tensor], dict[int, str]]:
    """Bring pairs under the UNet's own layer names to the numbers of the contract.

    Names are sorted by the numbers in them: a .safetensors file lists block 10 before block 2.
    """
    weights: dict[str, dict[str, Tensor]] = {}
    for name, tensor in processors.items():
        match = _PROCESSOR.fullmatch(name)
        if match and match["weight"] in ("to_k_ip.weight", "to_v_ip.weight"):
            weights.setdefault(match["layer"], {})[match["weight"]] = tensor
        else:
            what = f"unet.{name} is no part of an adapter that this trainer trains"
            raise Problem(what, where=str(path), remedy="FaceID's LoRA layers, for one, cannot be converted here")
    layers = dict(zip(range(1, 2 * len(weights), 2), sorted(weights, key=lambda n: _place(n, path)), strict=True))
    pairs = {f"{n}.{weight}": tensor for n, layer in layers.items() for weight, tensor in weights[layer].items()}
    return pairs, layers


def _place(layer: str, path: Path) -> tuple[int, ...]:
    """Return a layer's place among all layers: down, up, mid, then block, attention, transformer block."""
    match = _LAYER.fullmatch(layer)
    if match is None:
        what = f"the place of unet.{layer} among the layers cannot be told from its name"
        raise Problem(what, where=str(path), remedy="only adapters of diffusers' UNet2DConditionModel can be rescued")
    part, *numbers = match.groups()
    return (_ORDER[part], *(int(n or 0) for n in numbers))


def _check_weights(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Demand numbers in every tensor, of a type that weights have: what holds none can claim any width."""
    for name, tensor in tensors.items():
        if not tensor.numel():
            what = f"{name} has the shape {list(tensor.shape)}, which holds nothing"
            raise Problem(what, where=str(path), remedy="copy or download the file again")
        if not tensor.is_floating_point():
            what = f"{name} is {str(tensor.dtype).removeprefix('torch.')}, not floating point"
            raise Problem(what, where=str(path), remedy="take a file that was not quantised")
