"""A VAE in place of the base model's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ip_adapter_trainer.core.errors import Problem, as_load_problem
from ip_adapter_trainer.core.log import say
from ip_adapter_trainer.loading.config import BaseConfig
from ip_adapter_trainer.loading.hub import find
from ip_adapter_trainer.loading.weights import (
    Weights,
    load_module,
    load_tensors,
    names_of,
    read_config,
    wanted_weights,
    weights_in,
)

_PART = "the VAE"
_FLAG = "--pretrained_vae_model_name_or_path"


def load_vae(config: BaseConfig, base: Path, dtype: torch.dtype) -> Any:
    """Load the VAE that `pretrained_vae_model_name_or_path` names: a folder, hub id or .safetensors file.

    A single file takes the settings of the VAE in the folder of the base model.

    Raises:
        Problem: nothing is there, or it is no `AutoencoderKL`, or not whole.
    """
    from diffusers import AutoencoderKL

    name = str(config.pretrained_vae_model_name_or_path)

    def wanted(listed: Sequence[str]) -> list[str]:
        """Return a repository's files of the VAE, in its own folder where it has one."""
        folder = "vae" if "vae/config.json" in listed else ""
        weights = wanted_weights(listed, folder, config.weights_variant, _PART, name)
        return [f"{folder}/config.json" if folder else "config.json", *weights]

    path = find(name, _PART, wanted)
    if path.is_file():
        return _from_file(AutoencoderKL, path, base, dtype)
    folder = path / "vae" if (path / "vae" / "config.json").is_file() else path
    kind = read_config(folder, _PART).get("_class_name", "AutoencoderKL")
    if kind != "AutoencoderKL":
        raise Problem(f"{_PART} is {kind}, where AutoencoderKL is needed", where=name, remedy="give another VAE")
    return load_module(AutoencoderKL, weights_in(folder, config.weights_variant, _PART), _PART, dtype=dtype)


def _from_file(kind: Any, file: Path, base: Path, dtype: torch.dtype) -> Any:
    """Return a VAE from one file, with original or diffusers' names, and with the settings of the base model's VAE."""
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    remedy = "give an AutoencoderKL's .safetensors file, folder or hub id"
    if file.suffix != ".safetensors":
        raise Problem(f"{_PART} is read from .safetensors files only", where=str(file), remedy=remedy)
    settings = read_config(base / "vae", "the base model's vae")
    names_of(Weights(file.parent, None, (file,)), _PART)  # raises for a damaged file
    with as_load_problem(_PART, str(file), remedy):
        tensors = load_file(file)
        if any(".down." in name for name in tensors):
            tensors = convert_ldm_vae_checkpoint(tensors, settings)
    return load_tensors(kind, tensors, base / "vae", _PART, str(file), dtype=dtype)


def warn_of_other_latents(vae: Any, base: Path, config: BaseConfig) -> None:
    """Warn if a VAE scales its latents differently from the base model's own: they are of another space."""
    if not (base / "vae" / "config.json").is_file():
        return
    own = read_config(base / "vae", "the base model's vae").get("scaling_factor", 0.18215)
    other = vae.config.scaling_factor
    if own != other:
        named = config.pretrained_vae_model_name_or_path
        say(f"WARNING: {named} scales latents by {other}, the base model's own VAE by {own}: other latents")
