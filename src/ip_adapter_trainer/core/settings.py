"""The base of every part's own config class, from which `config.py` composes a run's settings.

Each part of the house owns a subclass of `Part`; field names are the flag names. A field's `description` is its help.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict

from ip_adapter_trainer.core.errors import Problem
from ip_adapter_trainer.core.shown import redacted


class Part(BaseModel):
    """Settings of one part: immutable, unknown keys refused.

    Usage::

        class OptimConfig(Part):
            learning_rate: float = Field(1e-4, gt=0, description="Peak rate of AdamW.")
            save_steps: Annotated[int, alias("checkpointing_steps")] = Field(2000, description="...")
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


@dataclass(frozen=True)
class Alias:
    """Marks other flag names of a field."""

    names: tuple[str, ...]


def alias(*names: str) -> Alias:
    """Other flags of a field, for use inside `Annotated`: long names without dashes, or a short one as `-o`."""
    return Alias(names)


def as_flags(settings: Mapping[str, Any]) -> list[str]:
    """Settings as command-line flags; a null leaves the default."""
    flags: list[str] = []
    for name, value in settings.items():
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no_{name}")
        elif isinstance(value, (list, tuple)):
            flags += [f"--{name}", *map(str, value)]
        elif value is not None:
            flags.append(f"--{name}={value}")
    return flags


def demand_no_secrets(argv: Sequence[str]) -> None:
    """Refuses a token or a password among flags, which every run writes down.

    Raises:
        Problem: there is one; its flag is named, never its value.
    """
    flag = ""
    for argument in argv:
        flag = argument.split("=")[0] if argument.startswith("-") else flag
        if redacted(argument) != argument:
            remedy = "tokens are read from the environment (HF_TOKEN); give paths and hub ids without them"
            raise Problem("a setting holds a token or a password", where=redacted(flag), remedy=remedy)
