"""`ip-adapter inspect`: what an adapter file holds, what it was made for, and which readers can take it."""

from __future__ import annotations

import json
import math
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from ip_adapter_trainer.adapter_files import (
    READERS,
    AdapterFile,
    find_weights,
    fitting_config,
    flags_to_fit,
    read_adapter,
    refusals,
)
from ip_adapter_trainer.adapter_files.file import foreign_of, published_shapes
from ip_adapter_trainer.adapter_files.guess import Foreign, base_guess, encoder_guess, tokens_guess
from ip_adapter_trainer.adapter_files.raw import RawFile, read_raw
from ip_adapter_trainer.adapter_files.readers import foreign_refusals
from ip_adapter_trainer.adapters import VARIANTS
from ip_adapter_trainer.adapters.plus import KOLORS
from ip_adapter_trainer.core.errors import Problem
from ip_adapter_trainer.core.redact import plain, redacted
from ip_adapter_trainer.core.settings import as_flags
from ip_adapter_trainer.file_config import InspectConfig
from ip_adapter_trainer.layouts import Reader
from ip_adapter_trainer.layouts.unet import SDXL_CONTEXT

FORMS = {
    "published": "published",
    "comfy": "ComfyUI's, pairs under adapter_modules",
    "checkpoint": "training checkpoint",
    "rescued": "published script's checkpoint that lost its adapter_modules; `ip-adapter export` rescues it",
}
# Names by which ComfyUI's unified loader finds a file, by variant, kind of base model and width of the feature.
_UNIFIED = {
    ("base", 768, 1024): "ip-adapter_sd15",
    ("base", 768, 1280): "ip-adapter_sd15_vit-G",
    ("base", 2048, 1024): "ip-adapter_sdxl_vit-h",
    ("base", 2048, 1280): "ip-adapter_sdxl",
    ("plus", 768, 1280): "ip-adapter-plus_sd15",
    ("plus", 2048, 1280): "ip-adapter-plus_sdxl_vit-h",
    ("full", 768, 1280): "ip-adapter-full-face_sd15",
}


@dataclass(frozen=True)
class AdapterReport:
    """Everything known about an adapter file; guesses are marked as guesses."""

    file: str
    container: str
    layout: str
    variant: str
    base_model: str
    tokens: int | None  # None: nothing in the file tells it
    layers: list[int]  # N of each
    parameters: dict[str, int]  # by table
    dtypes: list[str]
    image_encoder: str
    steps: int | None
    metadata: dict[str, str]
    readers: dict[Reader, str | None]  # None: takes it; else why not
    start_flags: str | None  # with which `train` starts from it
    start_refusal: str | None  # None: it can be started from; else why not
    remarks: list[str]

    def __str__(self) -> str:
        total = sum(self.parameters.values())
        parts = " + ".join(f"{name} {count:,}" for name, count in self.parameters.items())
        numbers = list(map(str, self.layers))
        shown = ", ".join(numbers if len(numbers) <= 6 else [*numbers[:3], "...", numbers[-1]])
        rows = [
            ("container", f"{self.container}, {self.layout}"),
            ("variant", self.variant),
            ("base model", self.base_model),
            ("tokens", "the file does not tell" if self.tokens is None else str(self.tokens)),
            ("layers", f"{len(self.layers)}: N = {shown}"),
            ("parameters", f"{total:,} = {parts}"),
            ("dtypes", ", ".join(self.dtypes)),
            ("image encoder", self.image_encoder),
            *([("steps", f"{self.steps:,}")] if self.steps is not None else []),
            *((f"  {_plain(key)}", _plain(value)) for key, value in sorted(self.metadata.items())),
            *((READERS[reader], "takes it" if why is None else f"no: {why}") for reader, why in self.readers.items()),
            ("train from it", f"with {self.start_flags}" if self.start_flags else f"no: {self.start_refusal}"),
            *(("note", remark) for remark in self.remarks),
        ]
        width = max(len(name) for name, _ in rows) + 2
        return "\n".join([plain(self.file), *(f"{name:<{width}}{text}" for name, text in rows)])

    def to_json(self) -> str:
        """Return the report as one JSON object."""
        return json.dumps(asdict(self), indent=1)


def inspect(config: InspectConfig) -> str:
    """Return the text that the command prints.

    Raises:
        Problem: the file cannot be read, or is no known kind of adapter.
    """
    report = examine(config.path)
    return redacted(report.to_json()) if config.as_json else str(report)


def examine(path: str | Path) -> AdapterReport:
    """Describe an adapter file; no model is loaded.

    Raises:
        Problem: the file cannot be read, or is no known kind of adapter.
    """
    raw = read_raw(find_weights(Path(path)))
    foreign = foreign_of(raw)
    return _of_foreign(raw, foreign) if foreign else _of_adapter(read_adapter(raw.path))


def _of_adapter(file: AdapterFile) -> AdapterReport:
    facts, card, why = file.facts, file.card, refusals(file)
    context_dim = facts["context_dim"]
    keys = [file.layer_shapes.get(f"{number}.to_k_ip.weight") for number in file.numbers]
    widths = [shape[0] for shape in keys if shape]
    flags, refusal = _start(file)
    need = file.variant.needs[0]
    encoder = encoder_guess(need.feature, file.feature_dim(need))
    if card and card.image_encoder != "clip":
        encoder = f"{card.image_encoder} ({need.feature}, {file.feature_dim(need)} wide)"
    return AdapterReport(
        file=str(file.path),
        container=file.container,
        layout=FORMS[file.origin] + ("" if file.layout.name == "unet" else f", layout {file.layout.name}"),
        variant=VARIANTS.name_of(file.variant),
        base_model=base_guess(context_dim, widths)
        + (f"; the file names {_plain(card.pretrained_model_name_or_path)}" if card else ""),
        tokens=_tokens(file),
        layers=file.numbers,
        parameters={table: sum(t.numel() for t in tensors.values()) for table, tensors in file.tables.items()},
        dtypes=_dtypes([*file.image_proj.values(), *file.ip_adapter.values()]),
        image_encoder=encoder + (f"; the file names {_plain(card.image_encoder_path)}" if card else ""),
        steps=file.step,
        metadata=file.metadata or (card.to_metadata() if card else {}),
        readers={reader: why.get(reader) for reader in READERS},
        start_flags=flags,
        start_refusal=refusal,
        remarks=_remarks(file, why),
    )


def _tokens(file: AdapterFile) -> int | None:
    return file.facts.get("num_tokens", file.card.num_tokens if file.card else None)


def _start(file: AdapterFile) -> tuple[str | None, str | None]:
    """Return the flags with which `train` starts from a file, or the reason why it cannot."""
    try:
        fitting_config(file)
    except Problem as problem:
        return None, _plain(problem.fault.what)
    flags = [f"--variant {VARIANTS.name_of(file.variant)}", *flags_to_fit(file)]
    if file.layout.name != "unet":
        flags += [f"--layout {file.layout.name}", *as_flags(file.layout_config().model_dump())]
    return " ".join(["--pretrained_ip_adapter_path", shlex.quote(plain(str(file.path))), *flags]), None


def _remarks(file: AdapterFile, why: Mapping[Reader, str]) -> list[str]:
    """Return what a user of the file must know and the file does not say."""
    facts, remarks = file.facts, [f"the file contradicts itself: {_plain(text)}" for text in file.contradictions]
    tokens = _tokens(file) or "the number of its image encoder's features (257 for ViT-H/14)"
    if file.card and file.card.image_encoder != "clip":
        how = ", ".join(f"{name}: {rule}" for name, rule in file.card.no_image.items())
        remarks.append(
            f"diffusers runs CLIP encoders alone: give it {file.card.image_encoder}'s features by "
            f'ip_adapter_image_embeds, "no image" ({how}) first (docs/encoders.md)'
        )
    if file.card and file.card.loaded_with:
        how = ", ".join(f"{name} {value}" for name, value in file.card.loaded_with.items())
        remarks.append(f"its frozen models were loaded with {_plain(how)}")
    if "original" not in why and tokens != 4:
        silent = "" if "num_tokens" in facts else ": without it, the file loads and another picture comes out"
        remarks.append(f"in the original code, give num_tokens={tokens}{silent}")
    name = _UNIFIED.get((VARIANTS.name_of(file.variant), facts["context_dim"], facts["feature_dim"]))
    if name and "comfy" not in why:
        remarks.append(f"ComfyUI's unified loader finds it as {name}.safetensors or .bin")
    if "comfy" not in why:
        middle = "121 to 139" if facts["context_dim"] == SDXL_CONTEXT else "31"
        remarks.append(f"ComfyUI_IPAdapter_plus (9d076a3) never applies N = {middle}, the middle block's; others do")
    if (facts.get("resampler_dim"), facts.get("resampler_heads")) == KOLORS:
        remarks.append("its resampler has the shape of Kolors', whose layers are SDXL's: likely made for Kolors")
    return remarks


def _of_foreign(raw: RawFile, kind: Foreign) -> AdapterReport:
    parameters = Counter[str]()
    published, why = published_shapes(raw), foreign_refusals(kind, raw.path)
    for name, shape in published.items():
        parameters[name.split(".")[0]] += math.prod(shape)
    numbers = {name.split(".")[1] for name in published if name.startswith(("ip_adapter.", "double_blocks."))}
    return AdapterReport(
        file=str(raw.path),
        container=raw.container,
        layout="that of its kind",
        variant=f"{kind.name}: recognised, this trainer does not train it yet",
        base_model="see the variant",
        tokens=tokens_guess(published),
        layers=sorted(int(number) for number in numbers if number.isdecimal() and len(number) < 5),
        parameters=dict(parameters),
        dtypes=_dtypes(list(raw.tensors.values())),
        image_encoder="see the variant",
        steps=None,
        metadata=raw.metadata,
        readers={reader: why.get(reader) for reader in READERS},
        start_flags=None,
        start_refusal="it is of another kind",
        remarks=[kind.remark] if kind.remark else [],
    )


def _plain(text: str) -> str:
    """Return one line of bounded length: a file's strings are whatever its maker wrote."""
    return plain(text)[:200] + "..." * (len(text) > 200)


def _dtypes(tensors: Sequence[Tensor]) -> list[str]:
    return sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})
