"""From an adapter file to a live model."""

from __future__ import annotations

from pathlib import Path

import torch

from ip_adapter_trainer.adapters import VARIANTS, AdapterFile, read_adapter
from ip_adapter_trainer.core.errors import Problem
from ip_adapter_trainer.encoders import ClipImageEncoder
from ip_adapter_trainer.families import FAMILIES, Family, family_of
from ip_adapter_trainer.model import Model


def load_model(
    adapter: str | Path,
    base: str | None = None,
    image_encoder: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Model:
    """An adapter on its frozen models, weights loaded strictly, not attached yet.

    Args:
        adapter: anything that `read_adapter` reads.
        base: pipeline folder or hub id; None: the one that the file names.
        image_encoder: folder or hub id; None: the one that the file names.
        dtype: of the frozen models; the adapter's own weights are fp32.
        device: of everything.

    Raises:
        Problem: unreadable, unnamed, or not made for this base and encoder.
    """
    return build_model(read_adapter(adapter), base, image_encoder, dtype, device)


def build_model(
    file: AdapterFile, base: str | None, image_encoder: str | None, dtype: torch.dtype, device: torch.device | str
) -> Model:
    """See `load_model`; of a file that has been read already."""
    config = file.config()  # before the minutes of loading a base model
    family = _load_family(file, base, dtype, device)
    encoder = _load_encoder(file, image_encoder, dtype, device)
    _check_widths(file, family, encoder)
    with torch.random.fork_rng():  # the first weights are drawn, and then replaced
        model = Model(family, encoder, file.variant, config)
    model.adapter.to(device)
    load_into(model, file)
    return model


def read_adapter_into(model: Model, path: str | Path) -> AdapterFile:
    """Loads an adapter file's weights into a model that exists; where one does not fit, none is changed.

    Raises:
        Problem: unreadable, of another variant, or made for other models.
    """
    file = read_adapter(path)
    load_into(model, file)
    return file


def load_into(model: Model, file: AdapterFile) -> None:
    """See `read_adapter_into`; of a file that has been read already."""
    if file.variant is not model.variant:
        mine, theirs = (VARIANTS.name_of(variant) for variant in (model.variant, file.variant))
        what, remedy = f"the file holds a {theirs} adapter, the model has a {mine} one", f"take --variant {theirs}"
        raise Problem(what, where=str(file.path), remedy=remedy)
    _check_widths(file, model.family, model.encoder)
    _check_layers(model, file)
    model.adapter.load_published(file.tables, str(file.path))


def _load_family(file: AdapterFile, base: str | None, dtype: torch.dtype, device: torch.device | str) -> Family:
    path = base or (file.card.pretrained_model_name_or_path if file.card else "")
    if not path:
        raise _unnamed("base model", "--pretrained_model_name_or_path", file)
    try:
        entry = FAMILIES[family_of(path)]
        return entry.load(path, entry.Config(), dtype=dtype, device=device)
    except Problem as problem:
        raise problem if base else _moved(problem, "--pretrained_model_name_or_path", file) from problem


def _load_encoder(
    file: AdapterFile, image_encoder: str | None, dtype: torch.dtype, device: torch.device | str
) -> ClipImageEncoder:
    path = image_encoder or (file.card.image_encoder_path if file.card else "")
    if not path:
        raise _unnamed("image encoder", "--image_encoder_path", file)
    try:
        return ClipImageEncoder.load(path, dtype=dtype, device=device)
    except Problem as problem:
        raise problem if image_encoder else _moved(problem, "--image_encoder_path", file) from problem


def _unnamed(part: str, flag: str, file: AdapterFile) -> Problem:
    return Problem(f"the adapter file does not name its {part}", where=str(file.path), remedy=f"give it with {flag}")


def _moved(problem: Problem, flag: str, file: AdapterFile) -> Problem:
    """The same problem, of a path that the user never gave."""
    return Problem(problem.what, where=f"{problem.where}, named by {file.path}", remedy=f"give another with {flag}")


def _check_widths(file: AdapterFile, family: Family, encoder: ClipImageEncoder) -> None:
    """Wrong models are told as such, before their tensors are told one by one."""
    facts, kind = file.facts, file.variant.feature
    width = encoder.width(kind)
    if facts["context_dim"] != family.context_dim:
        what = f"the adapter makes tokens of width {facts['context_dim']}, the base model reads {family.context_dim}"
        raise Problem(what, where=str(file.path), remedy="take the kind of base model that it was trained on")
    if facts["feature_dim"] != width:
        what = f"the adapter reads {kind} of width {facts['feature_dim']}, the image encoder gives {width}"
        raise Problem(what, where=str(file.path), remedy="take the image encoder that it was trained with")


def _check_layers(model: Model, file: AdapterFile) -> None:
    """Where a file names its layers, the numbers worked out from the names must be the base model's own."""
    names = {site.number: site.name for site in model.sites}
    for number, layer in file.layers.items():
        if names.get(number) != layer:
            what = f"layer {layer} would be number {number}, which is {names.get(number, 'none')} in the base model"
            raise Problem(what, where=str(file.path), remedy="take the base model that it was trained on")
