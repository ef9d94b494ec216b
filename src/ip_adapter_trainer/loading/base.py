"""The frozen base model: settings are looked at first, weights are read when those fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ip_adapter_trainer.core.settings import Part
from ip_adapter_trainer.families import FAMILIES, PARTS, BaseModel, Family, PartName
from ip_adapter_trainer.loading.config import BaseConfig
from ip_adapter_trainer.loading.found import Base
from ip_adapter_trainer.loading.text import load_tokenizer
from ip_adapter_trainer.loading.vae import load_vae, warn_of_other_latents
from ip_adapter_trainer.loading.weights import SPARE, load_module
from ip_adapter_trainer.nn.packed import Storage


def family_of(name: str, family: str = "auto", config: BaseConfig | None = None) -> str:
    """Return the family of a base model; a name other than "auto" is only checked to exist.

    Raises:
        Problem: an unknown name, no base model there, or one of no known family.
    """
    if family != "auto":
        FAMILIES[family]
        return family
    return Base.open(name, config or BaseConfig()).family


def load_base(
    name: str,
    config: BaseConfig | None = None,
    *,
    family: str = "auto",
    own: Part | None = None,
    noise: Mapping[str, Any] | None = None,
    dtype: torch.dtype,
    device: torch.device | str,
    parts: Sequence[PartName] = PARTS,
    storage: Storage = "none",
    packed_on: torch.device | str | None = None,
) -> BaseModel:
    """Load the frozen parts of a base model, each whole.

    Args:
        name: pipeline folder, hub id, or checkpoint in one .safetensors file.
        config: which files of it, and how texts are encoded.
        family: its family; auto: as it says itself.
        own: settings of the family's own.
        noise: scheduler settings that the user overrules.
        dtype: of the weights.
        device: where the parts are kept.
        parts: which to load; what needs another part must not be asked then.
        storage: how the denoiser keeps its weights.
        packed_on: the device that packs them, one after another; `device` by default.

    Raises:
        Problem: a part that is missing, not whole or of another kind, or noise that is not known.
    """
    config = config or BaseConfig()
    base = Base.open(name, config)
    family = base.family if family == "auto" else family
    entry = FAMILIES[family]
    names = [component for part in PARTS if part in parts for component in entry.components[part]]
    other_vae = "vae" in names and config.pretrained_vae_model_name_or_path is not None
    own_names = [component for component in names if component != "vae" or not other_vae]
    modules = [component for component in own_names if not component.startswith("tokenizer")]
    base.demand_classes({component: entry.classes[component] for component in own_names})
    loaded: dict[str, Any] = {"scheduler": base.scheduler(noise or {})}
    settings = {component: base.settings(component) for component in modules}
    if other_vae:
        loaded["vae"] = load_vae(config, base.folder, dtype)
        settings["vae"] = dict(loaded["vae"].config)
        warn_of_other_latents(loaded["vae"], base.folder, config)
    entry.demand(settings, config.clip_skip, base.name)
    loaded |= _tokenizers(base, entry, own_names)
    loaded |= _load_modules(base, entry, modules, dtype)
    made = BaseModel(family, *entry.assemble(loaded, base.index, own or entry.Config(), config.clip_skip))
    entry.settle(made, device, storage, packed_on or device)
    return made


def load_tokenizers(name: str, config: BaseConfig) -> list[Any]:
    """Load the tokenizers of a base model, see `load_base`, and nothing else of it.

    Raises:
        Problem: no base model of a known family there, or a tokenizer that is not its text encoder's.
    """
    base = Base.open(name, config)
    entry = FAMILIES[base.family]
    names = entry.components["text"]
    base.demand_classes({component: entry.classes[component] for component in names})
    return list(_tokenizers(base, entry, names).values())


def _tokenizers(base: Base, entry: type[Family], names: Sequence[str]) -> dict[str, Any]:
    """Return the tokenizers among a base model's components by name, each whole and its text encoder's."""
    loaded = {}
    for name in names:
        if name.startswith("tokenizer"):
            encoder = base.settings(name.replace("tokenizer", "text_encoder"))
            loaded[name] = load_tokenizer(base.folder / name, encoder, f"the base model's {name}", entry.kind_of(name))
    return loaded


def _load_modules(base: Base, entry: type[Family], names: Sequence[str], dtype: torch.dtype) -> dict[str, Any]:
    """Return modules of a base model by name, from its folder or its file."""
    spare = {name: f"{SPARE}|{entry.spare[name]}" if name in entry.spare else SPARE for name in names}
    if base.file is not None:
        kinds = {name: entry.kind_of(name) for name in names}
        return {n: base.file.module(kind, n, base.folder / n, dtype, spare[n]) for n, kind in kinds.items()}
    files = base.weights(names)
    return {
        name: load_module(entry.kind_of(name), files[name], f"the base model's {name}", dtype=dtype, spare=spare[name])
        for name in names
    }
