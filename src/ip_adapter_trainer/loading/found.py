"""A base model as it is found: a pipeline folder, a hub id or a checkpoint in one file; its weights not read yet."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ip_adapter_trainer.core.errors import Problem, did_you_mean
from ip_adapter_trainer.core.log import say
from ip_adapter_trainer.diffusion.schedulers import make_scheduler
from ip_adapter_trainer.families import FAMILIES
from ip_adapter_trainer.loading.config import BaseConfig
from ip_adapter_trainer.loading.hub import MOVED, find, here
from ip_adapter_trainer.loading.one_file import OneFile
from ip_adapter_trainer.loading.weights import Weights, read_config, variants_in, wanted_weights, weights_in

INDEX = "model_index.json"
_PART = "the base model"
_TELLING = ("unet", "transformer", "text_encoder", "text_encoder_2")  # parts by which families are told apart
_SMALL = re.compile(r"(?:[\w-]+/)?[\w.-]+\.(?:json|txt|model)")  # settings and tokenizers


@dataclass(frozen=True)
class Base:
    """A base model on this machine."""

    name: str  # as it was given
    config: BaseConfig  # which of its files
    folder: Path  # with model_index.json, settings and tokenizers
    file: OneFile | None  # the checkpoint with all weights; None: they lie in the folder
    index: Mapping[str, Any] = field(repr=False)  # the content of model_index.json

    @classmethod
    def open(cls, name: str, config: BaseConfig) -> Base:
        """Find a base model and read what it is.

        Raises:
            Problem: nothing there, or nothing that is a base model.
        """
        path = find(name, _PART, _small, config.revision)
        _demand_flags(name, path, config)
        if path.is_file():
            file = OneFile.open(path)
            file.demand_whole(has_vae=config.pretrained_vae_model_name_or_path is None)
            settings = _settings_of(file, config)
            return cls(name, config, settings, file, _index(settings, str(settings)))
        return cls(name, config, path, None, _index(path, name))

    @property
    def family(self) -> str:
        """The name of the family.

        Raises:
            Problem: none that is known.
        """
        for name, entry in FAMILIES.items():
            if entry.matches(self.index):
                return name
        found = str(self.index.get("_class_name"))
        parts = [f"{name} {self.class_of(name)}" for name in _TELLING if self.class_of(name)]
        what = f"no family for a {found}" + (f" with {', '.join(parts)}" if parts else "")
        raise Problem(what, where=self.name, remedy=f"{did_you_mean(found, FAMILIES)}; a family is told by its parts")

    def settings(self, part: str) -> dict[str, Any]:
        """Return the settings of a part.

        Raises:
            Problem: there are none.
        """
        return read_config(self.folder / part, f"the base model's {part}")

    def demand_classes(self, classes: Mapping[str, Sequence[str]]) -> None:
        """Demand parts of given classes.

        Raises:
            Problem: one is null, not there, or something else.
        """
        for name, kinds in classes.items():
            kind = self.class_of(name)
            if kind is None:
                state = "null in" if name in self.index else "not in"
                what, remedy = f"the base model's {name} is {state} {INDEX}", "take a base model that has one"
                remedy += ", or give one with --pretrained_vae_model_name_or_path" if name == "vae" else ""
                raise Problem(what, where=self.name, remedy=remedy)
            if kind not in kinds:
                what = f"the base model's {name} is {kind}, where {kinds[0]} is needed"
                raise Problem(what, where=self.name, remedy="take a base model of plain SD1.x, SD2.x or SDXL parts")

    def class_of(self, name: str) -> str | None:
        """Return the class of a part as model_index.json names it; None: null or not there."""
        entry = self.index.get(name)
        return entry[1] if isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str) else None

    def scheduler(self, noise: Mapping[str, Any]) -> Any:
        """Return the scheduler; what a checkpoint says goes before its settings, the user's `noise` before both.

        Raises:
            Problem: another noise process than those that are known.
        """
        overrides = dict(noise)
        if self.file is not None:
            is_stated = "prediction_type" in noise or self.config.base_config is not None
            overrides = self.file.noise(overrides, is_stated=is_stated) | overrides
        settings = read_config(self.folder / "scheduler", "the base model's scheduler", "scheduler_config.json")
        return make_scheduler(str(self.class_of("scheduler")), settings, overrides, self.name)

    def weights(self, parts: Sequence[str]) -> dict[str, Weights]:
        """Return the weight files of parts, downloaded if need be, in one variant each; a line tells of odd ones.

        Raises:
            Problem: a part has none, or none has the variant that was asked for.
        """
        asked = self.config.weights_variant

        def wanted(listed: Sequence[str]) -> list[str]:
            """Return a repository's files of these parts."""
            found = [wanted_weights(listed, part, asked, f"the base model's {part}", self.name) for part in parts]
            return [*_small(listed), *(name for names in found for name in names)]

        find(self.name, _PART, wanted, self.config.revision)
        folders = [self.folder / part for part in parts]
        known = variants_in([path.name for folder in folders if folder.is_dir() for path in folder.iterdir()])
        if asked and asked not in known:
            kinds = [str(variant) for variant in known if variant]
            remedy = did_you_mean(asked, kinds) if kinds else "leave --weights_variant out"
            raise Problem(f"the base model has no weights *.{asked}.safetensors", where=self.name, remedy=remedy)
        files = {part: weights_in(self.folder / part, asked, f"the base model's {part}") for part in parts}
        others = [f"{part} as {files[part].variant or 'plain'}" for part in parts if files[part].variant != asked]
        if others:
            say(f"the base model has no {asked or 'plain'} weights of these parts: taking {', '.join(others)}")
        return files


def _demand_flags(name: str, path: Path, config: BaseConfig) -> None:
    """Demands that what is asked for has a meaning for what was found."""
    is_here = here(name, _PART) is not None
    for flag, value, is_meant, of in (
        ("--base_config", config.base_config, path.is_file(), "a checkpoint in one file"),
        ("--weights_variant", config.weights_variant, path.is_dir(), "a folder or hub id"),
        ("--revision", config.revision, not is_here, "a hub id"),
    ):
        if value is not None and not is_meant:
            raise Problem(f"{flag} is for a base model that is {of}", where=name, remedy=f"leave {flag} out")


def _settings_of(file: OneFile, config: BaseConfig) -> Path:
    """Return the folder with the settings of a checkpoint in one file."""
    what = "settings of the base model"
    if config.base_config is None:
        repository = file.settings_repository()
        try:
            return find(MOVED.get(repository, repository), what, _small)
        except Problem as problem:
            remedy = "give --base_config: a diffusers folder of a model of its kind, whose weights are not read"
            raise problem.but(remedy=remedy) from problem
    folder = find(config.base_config, what, _small)
    if not folder.is_dir():
        remedy = "give a diffusers folder of a model of its kind, or a hub id"
        raise Problem("--base_config is a folder, and this is a file", where=str(folder), remedy=remedy)
    return folder


def _small(names: Sequence[str]) -> list[str]:
    return [name for name in names if _SMALL.fullmatch(name)]


def _index(folder: Path, given: str) -> dict[str, Any]:
    """Return the content of model_index.json."""
    if (folder / INDEX).is_file():
        return read_config(folder, "the base model", INDEX)
    nearby = [folder.parent, *sorted(entry for entry in folder.iterdir() if entry.is_dir())]
    found = [path for path in nearby if (path / INDEX).is_file()]
    found += [file for file in sorted(folder.glob("*.safetensors")) if _is_checkpoint(file)]
    forms = "give a diffusers pipeline folder, a hub id or a .safetensors file"
    remedy = f"did you mean {found[0]}?" if found else forms
    raise Problem(f"cannot read {INDEX} of the base model: there is none", where=given, remedy=remedy)


def _is_checkpoint(file: Path) -> bool:
    try:
        return OneFile.open(file).has("unet")
    except Problem:
        return False
