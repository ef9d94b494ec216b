"""Adapter files: read in every known form, written in the published one.

Forms that are read: a published .safetensors or .bin file; ComfyUI's, with `adapter_modules`; our `checkpoint-N/`; a
run's folder (its newest whole checkpoint); a checkpoint of the published script, even one without `adapter_modules`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ip_adapter_trainer.adapter_files.card import CARD, AdapterCard
from ip_adapter_trainer.adapter_files.guess import Foreign, foreign_kind, published_name
from ip_adapter_trainer.adapter_files.raw import Container, RawFile, read_raw
from ip_adapter_trainer.adapter_files.tables import Origin, tables_of
from ip_adapter_trainer.adapters import VARIANTS, Shapes, Variant, shapes_of
from ip_adapter_trainer.core.errors import Problem, StorageProblem, first_line
from ip_adapter_trainer.core.settings import Part
from ip_adapter_trainer.core.values import Need
from ip_adapter_trainer.layouts import Layout, Tables
from ip_adapter_trainer.storage.checkpoints import MANIFEST, newest, step_of, verified

WEIGHTS = ("pytorch_model.bin", "model.safetensors")  # in a checkpoint: ours, and the published script's
SUFFIXES = (".safetensors", ".bin")
SHA256 = "weights_sha256"


@dataclass(frozen=True)
class AdapterFile:
    """The content of an adapter file, under the published names."""

    path: Path
    origin: Origin
    container: Container
    image_proj: dict[str, Tensor]
    ip_adapter: dict[str, Tensor]
    metadata: dict[str, str]
    card: AdapterCard | None  # None: the file does not say what it was trained with
    layout: Layout
    layers: dict[int, str]  # by N, the layer's name, where the file has it

    @property
    def tables(self) -> dict[str, dict[str, Tensor]]:
        """Both tables of tensors [...], by their published names."""
        return {"image_proj": self.image_proj, "ip_adapter": self.ip_adapter}

    @cached_property
    def shapes(self) -> Shapes:
        """The shapes of the projector's tensors, which tell the variant."""
        return shapes_of(self.image_proj)

    @cached_property
    def layer_shapes(self) -> Shapes:
        """The shapes of the layers' tensors, which tell the layout."""
        return shapes_of(self.ip_adapter)

    @cached_property
    def numbers(self) -> list[int]:
        """N of every adapted layer, ascending."""
        return sorted({int(name.split(".")[0]) for name in self.ip_adapter})

    @property
    def step(self) -> int | None:
        """Optimizer steps that the weights were trained for; None if neither the card nor the folder's name says so."""
        return self.card.step if self.card else step_of(self.path.parent)

    @cached_property
    def variant(self) -> type[Variant]:
        """The variant that the projector belongs to.

        Raises:
            Problem: it belongs to no known variant, or to several.
        """
        owners = {name: entry for name, entry in VARIANTS.items() if entry.owns(self.shapes)}
        if self.card and self.card.variant in owners:
            return owners[self.card.variant]
        if len(owners) != 1:
            what = f"the projector belongs to {'several' if owners else 'none'} of the variants {', '.join(VARIANTS)}"
            raise Problem(what, where=str(self.path), remedy="`ip-adapter inspect` tells what kind of file it is")
        return next(iter(owners.values()))

    @cached_property
    def facts(self) -> dict[str, int]:
        """Sizes read off the shapes: `num_tokens` (not for every variant), `feature_dim`, `context_dim` and others.

        Raises:
            Problem: the shapes contradict the names.
        """
        try:
            return self.variant.facts(self.shapes)
        except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
            name = VARIANTS.name_of(self.variant)
            what = f"the projector has the names of the {name} variant and not its shapes ({type(error).__name__})"
            raise Problem(what, where=str(self.path), remedy="copy or download the file again") from error

    def config(self) -> Part:
        """Return the variant's settings: those of the card, else those that the shapes imply.

        Raises:
            Problem: the variant does not accept the settings, or the card contradicts the weights.
        """
        if self.contradictions:
            raise Problem(self.contradictions[0], where=str(self.path), remedy="copy or download both again")
        kind = self.variant.Config
        told = self.card.variant_config if self.card else self.facts
        values = {name: value for name, value in told.items() if self.card or name in kind.model_fields}
        try:
            return kind(**values)
        except ValueError as error:
            what = f"the variant's settings are not valid: {first_line(error)}"
            raise Problem(what, where=str(self.path), remedy="copy or download the file again") from error

    def feature_dim(self, need: Need) -> int:
        """Return the width of a feature that the projector reads."""
        return self.facts.get(f"feature_dim_{need.name}", self.facts["feature_dim"])

    def layout_config(self) -> Part:
        """Return the layout's settings, as the shapes of its layers tell them."""
        return self.layout.Config(**self.layout.settings(self.layer_shapes))

    @cached_property
    def contradictions(self) -> list[str]:
        """Every statement of the card that the weights' names and shapes contradict."""
        if self.card is None:
            return []
        facts = {"variant": VARIANTS.name_of(self.variant), "feature": self.variant.needs[0].feature, **self.facts}
        return [
            f"the card says {name} {said[name]!r}, the weights {value}"
            for said in (self.card.model_dump(), self.card.variant_config)
            for name, value in facts.items()
            if said.get(name) not in (None, value)
        ]


def read_adapter(path: str | Path) -> AdapterFile:
    """Read an adapter from a file, a checkpoint folder or a run's folder; check every name, number and hash.

    Raises:
        Problem: no adapter is there, one of a kind that is not trained here, or a damaged one.
    """
    raw = read_raw(find_weights(Path(path)))
    if foreign := foreign_of(raw):
        what = f"this is an adapter of another kind ({foreign.name}), which this trainer does not train"
        remedy = f"take one of the variants {', '.join(VARIANTS)}; of one trained here, the checkpoint or .safetensors"
        raise Problem(what, where=str(raw.path), remedy=remedy)
    card = _card(raw)
    tables = tables_of(raw, card.layout if card else None)
    adapter = AdapterFile(
        path=raw.path,
        origin=tables.origin,
        container=raw.container,
        image_proj=tables.image_proj,
        ip_adapter=tables.ip_adapter,
        metadata=raw.metadata,
        card=card,
        layout=tables.layout,
        layers=tables.layers,
    )
    written = raw.metadata.get(SHA256)
    if written is not None and written != weights_sha256(adapter.tables):
        remedy = f"copy or export it again; if it was changed on purpose, drop {SHA256} from its metadata"
        raise Problem("the weights are not the ones that were written", where=str(raw.path), remedy=remedy)
    return adapter


def foreign_of(raw: RawFile) -> Foreign | None:
    """Return the kind of an adapter that is not trained here; None if it has a card or its shapes are of no such kind.

    Raises:
        Problem: the card cannot be read.
    """
    return None if _card(raw) else foreign_kind(published_shapes(raw))


def published_shapes(raw: RawFile) -> Shapes:
    """Return the shapes of all tensors in a file but empty ones and scalars, by published names."""
    return shapes_of({published_name(name): t for name, t in raw.tensors.items() if t.numel() and t.ndim})


def _card(raw: RawFile) -> AdapterCard | None:
    beside = raw.path.with_name(CARD)
    if raw.path.name in WEIGHTS and beside.is_file():
        return AdapterCard.read(beside)
    return AdapterCard.from_metadata(raw.metadata, str(raw.path))


def find_weights(path: Path) -> Path:
    """Return the weights file that a path stands for: itself, a checkpoint's, or that of a run's newest whole one.

    Raises:
        Problem: the folder holds no weights, or the file differs from its checkpoint's manifest.
    """
    direct = _weights_in(path) if path.is_dir() else path
    if direct is not None:
        if not _whole(direct):
            raise Problem("the checkpoint is damaged", where=str(direct), remedy="take an older checkpoint")
        return direct
    folder = newest(path, lambda folder: (file := _weights_in(folder)) is not None and _whole(file))
    found = None if folder is None else _weights_in(folder)
    if found is not None:
        return found
    what, remedy = "the folder holds no checkpoint", "give a checkpoint-N, a run's output folder or an adapter file"
    raise Problem(what, where=str(path), remedy=remedy)


def _weights_in(folder: Path) -> Path | None:
    return next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)


def _whole(file: Path) -> bool:
    """Return whether weights and card match the checkpoint's manifest, which only our checkpoints have."""
    is_ours = file.name in WEIGHTS and (file.parent / MANIFEST).exists()
    return not is_ours or verified(file.parent, [file.name, CARD])


def weights_sha256(tables: Tables) -> str:
    """Return the SHA-256 of the names, dtypes, shapes and bytes of an adapter's tensors, whatever file holds them."""
    digest = hashlib.sha256()
    for table, tensors in sorted(tables.items()):
        for name, tensor in sorted(tensors.items()):
            digest.update(f"{table}.{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_adapter(path: Path, tables: Tables, metadata: Mapping[str, str], layout: Layout) -> None:
    """Write an adapter in its layout; the suffix decides the container. A .bin holds no metadata.

    Give it a `staged_file`, which gets its name only after it was checked.

    Raises:
        Problem: the suffix is not that of a container.
        StorageProblem: the disk is full or read-only.
    """
    check_suffix(path)
    plain = {t: {name: _alone(tensor) for name, tensor in tables[t].items()} for t in ("image_proj", "ip_adapter")}
    flat, nested = layout.to_file(plain), {table: dict[str, Tensor]() for table in plain}
    for name, tensor in flat.items():
        nested.setdefault(name.partition(".")[0], {})[name.partition(".")[2]] = tensor
    try:
        if path.suffix == ".safetensors":
            save_file(flat, path, metadata={"format": "pt", **metadata, SHA256: weights_sha256(plain)})
        else:
            with path.open("wb") as opened:  # given a path, torch would write the file's name into the file
                torch.save(nested, opened)
    except (OSError, RuntimeError, SafetensorError) as error:
        what = f"the adapter file was not written: {first_line(error)}"
        raise StorageProblem(what, where=str(path.parent), remedy="make room, or choose another folder") from error


def check_suffix(path: Path) -> None:
    """Refuse file names without the suffix of a container.

    Raises:
        Problem: the suffix is neither .safetensors nor .bin.
    """
    if path.suffix not in SUFFIXES:
        what = f"adapters are written as {' or '.join(SUFFIXES)}, not {path.suffix or 'without a suffix'}"
        raise Problem(what, where=str(path), remedy=f"name the file {path.stem}.safetensors")


def _alone(tensor: Tensor) -> Tensor:
    """Return a contiguous CPU tensor with its own storage: torch saves whole storages, which two names could share."""
    tensor = tensor.detach().cpu().contiguous()
    is_alone = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if is_alone else tensor.clone()
