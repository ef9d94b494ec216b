"""Loading of adapter files into live models."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ip_adapter_trainer.adapter_files import AdapterFile, fitting_config, flags_to_fit, read_adapter
from ip_adapter_trainer.adapters import IMAGE, VARIANTS, shapes_of
from ip_adapter_trainer.core.errors import Problem
from ip_adapter_trainer.core.settings import Part
from ip_adapter_trainer.diffusion.schedulers import NoiseConfig
from ip_adapter_trainer.encoders import ImageEncoder
from ip_adapter_trainer.families import BaseModel
from ip_adapter_trainer.layouts import choose_layout
from ip_adapter_trainer.loading.base import load_base
from ip_adapter_trainer.loading.config import BaseConfig, read_as
from ip_adapter_trainer.loading.encoder import load_encoders
from ip_adapter_trainer.model import Architecture, Model

# Settings in a card that belong to the base model it names, and to no other.
_OF_BASE = (
    "weights_variant", "revision", "base_config", "pretrained_vae_model_name_or_path", "prediction_type",
    "rescale_betas_zero_snr",
)  # fmt: skip


def load_model(
    adapter: str | Path,
    base: str | None = None,
    image_encoder: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    how: Part | None = None,
) -> Model:
    """Load an adapter and its frozen models, every weight checked; the adapter is not attached yet.

    Args:
        adapter: anything that `read_adapter` reads.
        base: pipeline folder, hub id or checkpoint in one file; None: the one that the file names.
        image_encoder: folder or hub id; None: the one that the file names.
        dtype: of the frozen models; the adapter's own weights are fp32.
        device: of everything.
        how: settings that hold those of `BaseConfig` and `NoiseConfig`; the file's card decides those not given.

    Raises:
        Problem: the file is unreadable, a model is not named, or the adapter was not made for these models.
    """
    return build_model(read_adapter(adapter), base, image_encoder, dtype, device, how)


def build_model(
    file: AdapterFile,
    base: str | None,
    image_encoder: str | None,
    dtype: torch.dtype,
    device: torch.device | str,
    how: Part | None = None,
) -> Model:
    """See `load_model`; for a file that has been read already."""
    config = fitting_config(file)  # before the minutes of loading a base model
    remembered = remembered_by(file, base, image_encoder)
    chosen = read_as(BaseConfig, how or BaseConfig(), remembered, str(file.path))
    noise = read_as(NoiseConfig, how or NoiseConfig(), remembered, str(file.path))
    with _named("base model", "pretrained_model_name_or_path", base, file) as name:
        base_model = load_base(name, chosen, noise=noise.overrides(), dtype=dtype, device=device)
    with _named("image encoder", "image_encoder_path", image_encoder, file) as name:
        encoders = load_encoders(file.variant.needs, name, config, chosen, dtype=dtype, device=device)
    _demand_layout(file, base_model)
    _check_widths(file, file.layout.token_dim(base_model.denoiser), encoders)
    with torch.random.fork_rng():  # the initial weights are drawn at random, and then replaced
        model = Model(base_model, encoders, Architecture(file.variant, config, file.layout, file.layout_config()))
    model.adapter.to(device)
    load_into(model, file)
    return model


def remembered_by(file: AdapterFile, base: str | None, image_encoder: str | None) -> dict[str, Any]:
    """Return the settings with which the card's frozen models were loaded, without those of replaced models."""
    card = file.card
    if card is None:
        return {}
    real = os.path.realpath  # names mean the same model, as far as their paths tell
    forgotten = set(_OF_BASE) if base and real(base) != real(card.pretrained_model_name_or_path) else set()
    if image_encoder and real(image_encoder) != real(card.image_encoder_path):
        forgotten.add("image_encoder_subfolder")
    return {name: value for name, value in card.loaded_with.items() if name not in forgotten}


def read_adapter_into(model: Model, path: str | Path) -> AdapterFile:
    """Load an adapter file's weights into an existing model; if one does not fit, none is changed.

    Raises:
        Problem: the file is unreadable, of another variant, or made for other models.
    """
    file = read_adapter(path)
    load_into(model, file)
    return file


def load_into(model: Model, file: AdapterFile) -> None:
    """See `read_adapter_into`; for a file that has been read already."""
    fitting_config(file)
    if file.layout.name != model.layout.name:
        what = f"the file has the layout {file.layout.name}, the model {model.layout.name}"
        raise Problem(what, where=str(file.path), remedy=f"take --layout {file.layout.name}")
    if file.variant is not model.variant:
        mine, theirs = (VARIANTS.name_of(variant) for variant in (model.variant, file.variant))
        what, remedy = f"the file holds a {theirs} adapter, the model has a {mine} one", f"take --variant {theirs}"
        raise Problem(what, where=str(file.path), remedy=remedy)
    _check_widths(file, model.layout.token_dim(model.denoiser), model.encoders)
    if flags := flags_to_fit(file, shapes_of(model.adapter.image_proj_model.state_dict())):
        what = "the model's projector has other sizes than the file's"
        raise Problem(what, where=str(file.path), remedy=f"take {' '.join(flags)}")
    _check_layers(model, file)
    model.adapter.load_published(file.tables, str(file.path))


@contextmanager
def _named(part: str, setting: str, given: str | None, file: AdapterFile) -> Iterator[str]:
    """Give the name of a model, the user's or the file's; a problem with the file's says how to name another."""
    name = given or getattr(file.card, setting, "")
    if not name:
        what = f"the adapter file does not name its {part}"
        raise Problem(what, where=str(file.path), remedy=f"give it with --{setting}")
    try:
        yield name
    except Problem as problem:
        where, remedy = problem.fault.where, problem.fault.remedy
        if given or where.startswith("--"):
            raise
        other = f"give another with --{setting}"
        told = f"{remedy}; or {other}" if remedy else other
        raise problem.but(where=f"{where}, named by {file.path}", remedy=told) from problem


def _demand_layout(file: AdapterFile, base: BaseModel) -> None:
    """Demand a base model that the file's layout goes with, before tensors are compared one by one."""
    try:
        variant = VARIANTS.name_of(file.variant)
        choose_layout(file.layout.name, variant, file.variant.layouts, base.family, base.denoiser.layouts)
    except Problem as problem:
        remedy = "take the kind of base model that it was trained on"
        raise problem.but(where=str(file.path), remedy=remedy) from problem


def _check_widths(file: AdapterFile, token_dim: int, encoders: Mapping[str, ImageEncoder]) -> None:
    """Demand models of the file's widths and kind of encoder, before tensors are compared one by one."""
    facts = file.facts
    if facts["context_dim"] != token_dim:
        what = f"the adapter makes tokens of width {facts['context_dim']}, the base model reads {token_dim}"
        raise Problem(what, where=str(file.path), remedy="take the kind of base model that it was trained on")
    for need in file.variant.needs:
        width, read = encoders[need.role].features[need.feature][-1], file.feature_dim(need)
        if read != width:
            what = f"the adapter reads {need.feature} of width {read}, the image encoder gives {width}"
            raise Problem(what, where=str(file.path), remedy="take the image encoder that it was trained with")
    if file.card and file.card.image_encoder != encoders[IMAGE].kind:
        what = f"the adapter reads a {file.card.image_encoder} encoder, and this is a {encoders[IMAGE].kind} one"
        raise Problem(what, where=str(file.path), remedy="take the image encoder that it was trained with")


def _check_layers(model: Model, file: AdapterFile) -> None:
    """Demand that layers which a file names have the same numbers in the base model."""
    names = {layer.number: layer.name for layer in model.layers}
    for number, name in file.layers.items():
        if names.get(number) != name:
            what = f"layer {name} would be number {number}, which is {names.get(number, 'none')} in the base model"
            raise Problem(what, where=str(file.path), remedy="take the base model that it was trained on")
