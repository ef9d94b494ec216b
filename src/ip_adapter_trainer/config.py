"""A run's settings, composed from the parts' own classes: flags over a YAML file over defaults, written back resolved.

The composed class has one flat set of names, which are the flags, the YAML keys and the attributes alike. A variant's
and a family's settings are flags too: the two are looked up first, then their `Config` classes join the others.
Nothing heavy is imported before every mistake that the flags alone show is reported.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import create_model
from pydantic.fields import FieldInfo

from ip_adapter_trainer.adapters import VARIANTS
from ip_adapter_trainer.core.errors import Problem, did_you_mean
from ip_adapter_trainer.core.log import say
from ip_adapter_trainer.core.settings import Part, as_flags
from ip_adapter_trainer.flags import HELP, HELP_ALL, judged, read_flags
from ip_adapter_trainer.layouts import LAYOUTS
from ip_adapter_trainer.loading.config import BaseConfig
from ip_adapter_trainer.runtime.launcher import accumulation_steps, demand_same_accumulation
from ip_adapter_trainer.storage.documents import read_yaml
from ip_adapter_trainer.train.config import TrainConfig
from ip_adapter_trainer.train.help import about, grouped
from ip_adapter_trainer.train.presets import PRESETS

P = TypeVar("P", bound=Part)
RESOLVED = "config.yaml"
# Settings of earlier versions that were removed, and why.
GONE = {"lean_attention": "it made no measurable difference"}
# Settings that, beside its name, identify a base model.
_OF_BASE = ("base_config", "revision", "weights_variant", "pretrained_vae_model_name_or_path")


def own_parts(variant: str, family: str, layout: str | None = None) -> dict[str, type[Part]]:
    """Return the settings classes that a run has for its variant, family and layout, by their titles in the help.

    A layout's settings are included if it is asked for, or is the only one that the variant goes with.

    Raises:
        Problem: an unknown name.
    """
    parts = {f"Variant {variant}": VARIANTS[variant].Config}
    if family != "auto":
        from ip_adapter_trainer.families import FAMILIES

        parts[f"Family {family}"] = FAMILIES[family].Config
    if layout or len(VARIANTS[variant].layouts) == 1:
        name = layout or VARIANTS[variant].layouts[0]
        parts[f"Layout {name}"] = LAYOUTS[name].Config
    return parts


@cache
def compose(variant: str, family: str, layout: str | None = None) -> type[TrainConfig]:
    """Return the settings class of a run with these parts; the family "auto" adds no settings.

    Raises:
        Problem: an unknown name.
    """
    parts: tuple[type[Part], ...] = (TrainConfig, *own_parts(variant, family, layout).values())
    bases = tuple(p for p in dict.fromkeys(parts) if not any(q is not p and issubclass(q, p) for q in parts))
    return create_model("TrainSettings", __base__=bases)  # type: ignore[arg-type]


def groups_of(variant: str, family: str, layout: str | None = None) -> dict[str, dict[str, FieldInfo]]:
    """Return the settings of a run by their names, in the groups in which the help lists them."""
    return grouped(compose(variant, family, layout), own_parts(variant, family, layout))


def parse(kind: type[P], argv: Sequence[str], *, prog: str) -> P:
    """Read flags into a settings class; unknown flags end the program, `prog`, (exit 2) with a suggestion.

    Raises:
        Problem: a value that a part's own rules refuse, with its flag; or flags that only `train` has.
    """
    _demand_own(kind, argv, prog)
    flags = ["--help" if flag in HELP_ALL else flag for flag in argv]
    values = read_flags({"": kind.model_fields}, flags, prog=prog, about=kind.__doc__ or "", defaults={})
    return judged(kind, values, prog)


def _demand_own(kind: type[Part], argv: Sequence[str], prog: str) -> None:
    """Refuse flags that only `train` has; they come with command lines that are copied from `train`."""
    given = TrainConfig.current_names({_setting_of(flag): flag.split("=")[0] for flag in argv if flag[:2] == "--"})
    foreign = [flag for name, flag in given.items() if name in TrainConfig.model_fields.keys() - kind.model_fields]
    if foreign:
        remedy = f"leave {'it' if len(foreign) == 1 else 'them'} out; {prog} --help lists what is read"
        raise Problem(f"{prog} does not read these settings of training", where=" ".join(foreign), remedy=remedy)


def _setting_of(flag: str) -> str:
    return flag.split("=")[0].removeprefix("--").replace("-", "_").removeprefix("no_")


def parse_train(
    argv: Sequence[str],
    *,
    prog: str = "ip-adapter train",
    defaults: Mapping[str, Any] | None = None,
    look: Callable[[TrainConfig], None] | None = None,
) -> TrainConfig:
    """Return the settings of a training run from flags and, with `--config FILE`, a YAML file beneath them.

    Scripts have `defaults` of their own. `look` is called with the settings before the base model is looked for; those
    that depend on it have defaults then.

    Raises:
        Problem: a setting is unknown, removed or refused, or there is no base model of a known family.
    """
    asked = _Asked.of(argv, prog, dict(defaults or {}))
    if look:
        look(asked.before_the_base())
    config = asked.settled()
    demand_same_accumulation(config.gradient_accumulation_steps)
    return config


@dataclass(frozen=True)
class _Asked:
    """The settings that a command line and its settings file ask for."""

    prog: str  # the program's name in messages
    variant: str  # the adapter variant
    layout: str | None  # the layout; None: the first that both base model and variant list
    file: str | None  # the settings file, if there is one
    beneath: dict[str, Any]  # the settings in that file
    given: dict[str, Any]  # flags that decide the settings class, or its defaults
    flags: list[str]  # the other flags
    defaults: dict[str, Any]  # values in place of the settings' own defaults

    @classmethod
    def of(cls, argv: Sequence[str], prog: str, defaults: dict[str, Any]) -> _Asked:
        """Return what a command line asks for; if it asks for help, print that and end the program.

        Raises:
            Problem: the file cannot be read, or a setting is unknown or removed.
        """
        for flag in (flag for flag in argv if flag[:2] == "--" and _setting_of(flag) in GONE):
            remedy = f"leave it out: {GONE[_setting_of(flag)]}"
            raise Problem("this setting is gone", where=flag.split("=")[0], remedy=remedy)
        given, flags = _peek(argv)
        file = given.pop("config", None)
        beneath = read_yaml(file) if file else {}
        chosen = {"variant": "base"} | defaults | beneath | given
        variant, layout = str(chosen["variant"]), chosen.get("layout")
        if variant not in VARIANTS:  # in diffusers' scripts, this is the kind of weight files
            remedy = did_you_mean(variant, VARIANTS)
            remedy += f"; for weight files *.{variant}.safetensors give --weights_variant {variant}"
            raise Problem(f"no adapter variant {variant!r}", where="--variant", remedy=remedy)
        kind = compose(variant, "auto", layout)
        if HELP.union(HELP_ALL).intersection(flags):
            groups = groups_of(variant, "auto", layout)
            shown = groups if HELP_ALL.intersection(flags) else {"Essential": groups["Essential"]}
            read_flags(shown, ["--help"], prog=prog, about=about(prog, groups), defaults=defaults)
        if file:
            beneath = _current(beneath, kind, file)
        own = {k: v for k, v in defaults.items() if k not in beneath}  # they do not replace a null in the file either
        launched = accumulation_steps()
        if launched is not None and "gradient_accumulation_steps" not in beneath:
            own["gradient_accumulation_steps"] = launched
        return cls(prog, variant, layout, file, beneath, given, flags, own)

    def before_the_base(self) -> TrainConfig:
        """Return the settings without a family's own; those that depend on the base model have their defaults."""
        spare: list[str] = []
        config = self._read("auto", {}, spare)
        if spare and not _of_families():  # no family has them either: report them
            self._read("auto", {})
        return config

    def settled(self) -> TrainConfig:
        """Return all settings, with those of the base model's family."""
        chosen = {"family": "auto"} | self.beneath | self.given
        base, family = chosen.get("pretrained_model_name_or_path"), str(chosen["family"])
        if base:
            from ip_adapter_trainer.loading.base import family_of

            where = BaseConfig(**{name: str(chosen[name]) for name in _OF_BASE if chosen.get(name) is not None})
            family = family_of(str(base), family, where)
        if self.file:
            check_keys(self.beneath, compose(self.variant, family, self.layout).model_fields, self.file)
        return self._read(family, _preset(family, chosen.get("low_memory")))

    def _read(self, family: str, preset: dict[str, Any], spare: list[str] | None = None) -> TrainConfig:
        chosen = {"variant": self.variant} | self.beneath | self.given
        chosen = chosen | preset if "low_memory" in self.given else preset | chosen
        # What a file says comes first, so that a flag given on the command line has the last word.
        flags = [*as_flags(chosen), *self.flags]
        own = self.variant, family, self.layout
        groups, kind = groups_of(*own), compose(*own)
        values = read_flags(groups, flags, prog=self.prog, about="", defaults=self.defaults, spare=spare)
        return judged(kind, {name: value for name, value in values.items() if name in kind.model_fields}, self.prog)


def _peek(argv: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Return the flags that decide the settings class or its defaults, and the other flags."""
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("config", "variant", "family", "layout", "low_memory", "pretrained_model_name_or_path", *_OF_BASE):
        peek.add_argument(f"--{name}", f"--{name.replace('_', '-')}", dest=name)
    known, flags = peek.parse_known_args(list(argv))
    return {name: value for name, value in vars(known).items() if value is not None}, flags


def _current(settings: Mapping[str, Any], kind: type[Part], file: str) -> dict[str, Any]:
    """Return a file's settings under their present names; an earlier version may have written the file."""
    for name in settings.keys() & GONE.keys():
        say(f"{name} in {file} is passed over: {GONE[name]}")
    current = kind.current_names({name: value for name, value in settings.items() if name not in GONE})
    if current.get("mixed_precision", "") is None:  # no version that knows bf16's own has written it so
        current["mixed_precision"] = "no"
    if "adam_beta1" in current:  # all settings of a run, which before there was a choice were AdamW's
        current.setdefault("optimizer", "adamw")
    if current.keys() - kind.model_fields:
        check_keys(current, kind.model_fields.keys() | _of_families(), file)
    return current


def _of_families() -> set[str]:
    """Return the names of all families' own settings."""
    from ip_adapter_trainer.families import FAMILIES

    return {name for _, family in FAMILIES.items() for name in family.Config.model_fields}


def _preset(family: str, memory: object) -> dict[str, Any]:
    """Return the settings that `--low_memory` stands for; a value that it does not accept is reported later."""
    if memory is None or family == "auto":
        return {}
    if family not in PRESETS:
        remedy = "leave it out, and set --quantize, --gradient_checkpointing and others"
        raise Problem(f"no settings of {family} are known for small cards", where="--low_memory", remedy=remedy)
    return next((dict(settings) for size, settings in PRESETS[family].items() if str(size) == str(memory)), {})


def check_keys(settings: Mapping[str, Any], known: Collection[str], where: str) -> None:
    """Demand known settings.

    Raises:
        Problem: an unknown name, with the closest known one.
    """
    for name in settings:
        if name not in known:
            raise Problem(f"unknown setting {name!r}", where=where, remedy=did_you_mean(str(name), known))


def write_resolved(config: Part, folder: Path) -> Path:
    """Write every setting, defaults included, as a YAML file that `--config` takes."""
    import yaml

    from ip_adapter_trainer.storage.staging import staged_file

    file = folder / RESOLVED
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    with staged_file(file) as stage:
        stage.write_text(text, encoding="utf-8")
    return file
