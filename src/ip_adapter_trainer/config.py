"""A run's settings, composed from the parts' own classes: flags over a YAML file over defaults, written back resolved.

The composed class has one flat set of names, which are the flags, the YAML keys and the attributes alike. A variant's
and a family's settings are flags too: the two are looked up first, then their `Config` classes join the others.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro
import yaml
from pydantic import ValidationError, create_model

from ip_adapter_trainer.adapters import VARIANTS
from ip_adapter_trainer.core.errors import Problem, did_you_mean
from ip_adapter_trainer.core.settings import Alias, Part, as_flags
from ip_adapter_trainer.families import FAMILIES
from ip_adapter_trainer.layouts import LAYOUTS
from ip_adapter_trainer.loading.base import family_of
from ip_adapter_trainer.loading.config import BaseConfig
from ip_adapter_trainer.runtime.launcher import accumulation_steps, demand_same_accumulation
from ip_adapter_trainer.storage.settings_file import read_yaml
from ip_adapter_trainer.storage.staging import staged_file
from ip_adapter_trainer.train.config import TrainConfig

P = TypeVar("P", bound=Part)
RESOLVED = "config.yaml"
# What tells, beside its name, what a base model is.
_OF_BASE = ("base_config", "revision", "weights_variant", "pretrained_vae_model_name_or_path")


def compose(variant: str, family: str, layout: str | None = None) -> type[TrainConfig]:
    """Return the settings class of a run with this variant and family; "auto" adds no family settings.

    The settings of a layout are there where it is asked for, or the only one that the variant goes with.

    Raises:
        Problem: an unknown name.
    """
    parts: tuple[type[Part], ...] = (TrainConfig, VARIANTS[variant].Config)
    if family != "auto":
        parts += (FAMILIES[family].Config,)
    if layout or len(VARIANTS[variant].layouts) == 1:
        parts += (LAYOUTS[layout or VARIANTS[variant].layouts[0]].Config,)
    bases = tuple(p for p in dict.fromkeys(parts) if not any(q is not p and issubclass(q, p) for q in parts))
    name, doc = "TrainSettings", "Train an image-prompt adapter."
    return create_model(name, __base__=bases, __doc__=doc)  # type: ignore[arg-type]


def parse(kind: type[P], argv: Sequence[str], *, prog: str, defaults: Mapping[str, Any] | None = None) -> P:
    """Reads flags into a settings class; unknown flags end the program with what was probably meant (exit 2).

    Args:
        kind: the settings class.
        argv: flags.
        prog: the program's name in messages.
        defaults: values in place of the class's own defaults.

    Raises:
        Problem: a value that a part's own rules refuse; each with its flag.
    """
    flags = tyro.cli(_flags_of(kind, defaults or {}), args=list(argv), prog=prog, use_underscores=True)
    try:
        return kind(**dataclasses.asdict(flags))
    except ValidationError as error:
        faults = [(e["loc"][0] if e["loc"] else "", e["msg"].removeprefix("Value error, ")) for e in error.errors()]
        what = "; ".join(f"{name}: {message}" if name else message for name, message in faults)
        where = " ".join(f"--{name}" for name, _ in faults if name) or prog
        raise Problem(what, where=where, remedy=f"see {prog} --help") from error


def _flags_of(kind: type[Part], defaults: Mapping[str, Any]) -> Any:
    """A plain dataclass with a settings class's fields, so that values are read first and judged by us after."""
    fields = []
    for name, info in kind.model_fields.items():
        arg = tyro.conf.arg(help=info.description, aliases=_aliases(info.metadata))
        extra = [mark for mark in info.metadata if not isinstance(mark, Alias)]
        note: Any = Annotated[(info.annotation, arg, *extra)]  # type: ignore[valid-type]
        fields.append(
            (name, note, dataclasses.field())
            if info.is_required()
            else (name, note, dataclasses.field(default=defaults.get(name, info.default)))
        )
    fields.sort(key=lambda f: f[2].default is not dataclasses.MISSING)
    return dataclasses.make_dataclass(kind.__name__, fields, namespace={"__doc__": kind.__doc__})


def _aliases(metadata: Sequence[Any]) -> list[str]:
    return [n if n.startswith("-") else f"--{n}" for mark in metadata if isinstance(mark, Alias) for n in mark.names]


def parse_train(
    argv: Sequence[str], *, prog: str = "ip-adapter train", defaults: Mapping[str, Any] | None = None
) -> TrainConfig:
    """Settings of a training run from flags and, with `--config FILE`, a YAML file beneath them.

    Args:
        argv: flags.
        prog: the program's name in messages.
        defaults: values in place of the settings' own defaults, for scripts that do something of their own.
    """
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("config", "variant", "family", "layout", "low_memory", "pretrained_model_name_or_path", *_OF_BASE):
        peek.add_argument(f"--{name}", f"--{name.replace('_', '-')}", dest=name)
    known, flags = peek.parse_known_args(list(argv))
    beneath = read_yaml(known.config) if known.config else {}
    given = {k: v for k, v in vars(known).items() if v is not None and k != "config"}
    own = {k: v for k, v in (defaults or {}).items() if k not in beneath}  # a null in the file is not overruled either
    chosen = {"variant": own.get("variant", "base"), "family": "auto"} | beneath | given
    base = chosen.get("pretrained_model_name_or_path")
    asks_help = "-h" in flags or "--help" in flags
    _demand_variant(str(chosen["variant"]))  # before the hub is asked for anything
    where = BaseConfig(**{name: str(chosen[name]) for name in _OF_BASE if chosen.get(name) is not None})
    family = chosen["family"] if asks_help or not base else family_of(str(base), str(chosen["family"]), where)
    kind = compose(str(chosen["variant"]), str(family), chosen.get("layout"))
    if known.config:
        check_keys(beneath, kind, known.config)
    card = _small_card(str(family), chosen.get("low_memory"))
    chosen = card | chosen if "low_memory" in beneath and "low_memory" not in given else chosen | card
    # What a file says comes first, so that a flag given on the command line has the last word.
    launched = accumulation_steps()
    if launched is not None and "gradient_accumulation_steps" not in beneath:
        own["gradient_accumulation_steps"] = launched
    config = parse(kind, [*as_flags(chosen), *flags], prog=prog, defaults=own)
    demand_same_accumulation(config.gradient_accumulation_steps)
    return config


def _demand_variant(name: str) -> None:
    """Demands a variant of the adapter; diffusers' scripts call the kind of weight files so.

    Raises:
        Problem: there is none of this name.
    """
    if name not in VARIANTS:
        remedy = did_you_mean(name, VARIANTS)
        remedy += f"; for weight files *.{name}.safetensors give --weights_variant {name}"
        raise Problem(f"no adapter variant {name!r}", where="--variant", remedy=remedy)


def _small_card(family: str, memory: object) -> dict[str, Any]:
    """The settings that `--low_memory` stands for: over a file where the flag is given, under the file that has it.

    Raises:
        Problem: the family has none for so much memory.
    """
    if memory is None or family == "auto":
        return {}
    cards = {str(size): settings for size, settings in FAMILIES[family].small_cards.items()}
    if str(memory) not in cards:
        remedy = f"give one of {', '.join(cards)}" if cards else "set --quantize, --gradient_checkpointing and others"
        raise Problem(f"no settings of {family} for {memory} GB", where="--low_memory", remedy=remedy)
    return dict(cards[str(memory)])


def check_keys(settings: Mapping[str, Any], kind: type[Part], where: str) -> None:
    """Refuses settings that a class does not have.

    Raises:
        Problem: an unknown name, with the closest known one.
    """
    for name in settings:
        if name not in kind.model_fields:
            raise Problem(f"unknown setting {name!r}", where=where, remedy=did_you_mean(str(name), kind.model_fields))


def write_resolved(config: Part, folder: Path) -> Path:
    """Writes every setting, defaults included, as a YAML file that `--config` takes."""
    file = folder / RESOLVED
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    with staged_file(file) as stage:
        stage.write_text(text, encoding="utf-8")
    return file
