"""The base of every part's own config class, from which `config.py` composes a run's settings.

Each part of the house owns a subclass of `Part`; field names are the flag names. A field's `description` is its help.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

from ip_adapter_trainer.core.errors import Problem
from ip_adapter_trainer.core.redact import redacted


@dataclass(frozen=True)
class Resume:
    """Rules for changing a part's own settings between a run and its resumption; each is a list of names."""

    must_match: str = ""  # the run would be another one; each may be accepted by name
    of_state: str = ""  # must match too, and cannot be accepted: they decide which tensors a checkpoint holds
    may_change: str = ""  # and is told
    free: str = ""  # says nothing of what is trained

    def lists(self) -> dict[str, list[str]]:
        """Return the names in each list."""
        return {name: names.split() for name, names in vars(self).items()}


class Part(BaseModel):
    """Settings of one part: immutable, unknown keys refused.

    A class says of each of its own fields in `resume` what a resumed run may do with it, and in `group` under which
    title the help of `train` lists them.

    Usage::

        class OptimConfig(Part):
            group = "Optimizer"
            resume = Resume(may_change="learning_rate", free="save_steps")

            learning_rate: float = Field(1e-4, gt=0, description="Peak rate of AdamW.")
            save_steps: Annotated[int, alias("checkpointing_steps")] = Field(2000, description="...")
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False, defer_build=True
    )
    group: ClassVar[str] = "Advanced"
    resume: ClassVar[Resume] = Resume()

    @classmethod
    def current_names(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return settings under the names of now, in place of aliases: of earlier versions, or of other trainers."""
        marks = [(n, m) for n, f in cls.model_fields.items() for m in f.metadata if isinstance(m, Alias)]
        now = {other: name for name, mark in marks for other in mark.names}
        return {now.get(name, name): value for name, value in settings.items()}

    @classmethod
    def resume_lists(cls) -> dict[str, list[str]]:
        """Return the names in each list of `Resume`, for this class and all those that it is composed of."""
        owners = [kind.__dict__["resume"] for kind in cls.__mro__ if "resume" in kind.__dict__]
        return {name: [n for owner in owners for n in owner.lists()[name]] for name in Resume().lists()}


@dataclass(frozen=True)
class Alias:
    """Marks other flag names of a field."""

    names: tuple[str, ...]


def alias(*names: str) -> Alias:
    """Return other flags of a field, for use inside `Annotated`: long names without dashes, or a short one as `-o`."""
    return Alias(names)


def as_flags(settings: Mapping[str, Any]) -> list[str]:
    """Return settings as command-line flags; a null leaves the default."""
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
    """Refuse a token or a password among flags, since every run writes its flags down.

    Raises:
        Problem: there is one; its flag is named, never its value.
    """
    flag = ""
    for argument in argv:
        flag = argument.split("=")[0] if argument.startswith("-") else flag
        if redacted(argument) != argument:
            remedy = "tokens are read from the environment (HF_TOKEN); give paths and hub ids without them"
            raise Problem("a setting holds a token or a password", where=redacted(flag), remedy=remedy)
