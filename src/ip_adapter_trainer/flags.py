"""Settings as command-line flags: tyro reads them and shows their help, the settings class itself judges the values."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args

import tyro
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from ip_adapter_trainer.core.errors import Problem
from ip_adapter_trainer.core.settings import Alias, Part

P = TypeVar("P", bound=Part)
_STRINGS = tyro.constructors.PrimitiveConstructorSpec(
    nargs="*", metavar="[STR [STR ...]]", instance_from_str=tuple, str_from_instance=list,
    is_instance=lambda value: isinstance(value, tuple),
)  # fmt: skip
HELP, HELP_ALL = frozenset({"-h", "--help"}), frozenset({"--help_all", "--help-all"})


def read_flags(
    groups: Mapping[str, Mapping[str, FieldInfo]],
    argv: Sequence[str],
    *,
    prog: str,
    about: str,
    defaults: Mapping[str, Any],
    spare: list[str] | None = None,
) -> dict[str, Any]:
    """Return the values of flags by their settings' names, not judged yet.

    A value that cannot be read, a flag that is missing or unknown and `--help` end the program (exit 2 or 0).

    Args:
        groups: the settings by the title under which the help lists them; "" for no title.
        argv: flags.
        prog: the program's name in messages.
        about: the text above the help.
        defaults: values in place of the settings' own defaults.
        spare: takes what is no flag of these settings.
    """
    boxes = [
        (f"group_{number}", Annotated[_box(fields, defaults), tyro.conf.arg(name=title), tyro.conf.OmitArgPrefixes])
        for number, (title, fields) in enumerate(groups.items())
    ]
    kind: Any = dataclasses.make_dataclass("Flags", boxes)
    how: dict[str, Any] = {"prog": prog, "description": about, "use_underscores": True}
    how["config"] = (tyro.conf.HelptextFromCommentsOff,)  # for which it would read and parse this file
    if spare is None:
        found = tyro.cli(kind, args=list(argv), **how)
    else:
        found, unknown = tyro.cli(kind, args=list(argv), return_unknown_args=True, **how)
        spare += unknown
    return {name: value for box in vars(found).values() for name, value in vars(box).items()}


def _box(fields: Mapping[str, FieldInfo], defaults: Mapping[str, Any]) -> type:
    """Return a plain dataclass of settings, so that values are read first and judged by us after."""
    made = []
    for name, info in fields.items():
        arg = tyro.conf.arg(help=info.description, aliases=_aliases(info.metadata))
        marks = [mark for mark in info.metadata if not isinstance(mark, Alias)]
        note: Any = Annotated[(*_light(info.annotation), arg, *marks)]
        default: Any = {} if info.is_required() else {"default": defaults.get(name, info.default)}
        made.append((name, note, dataclasses.field(**default)))
    made.sort(key=lambda field: field[2].default is not dataclasses.MISSING)
    return dataclasses.make_dataclass("Group", made)


def _light(kind: Any) -> tuple[Any, ...]:
    """Return a type in a form whose defaults tyro checks by itself, without importing typeguard (50 ms)."""
    if isinstance(kind, UnionType):
        return (Union[get_args(kind)],)  # noqa: UP007
    return (tuple, _STRINGS) if kind == tuple[str, ...] else (kind,)


def _aliases(metadata: Sequence[Any]) -> list[str]:
    return [n if n.startswith("-") else f"--{n}" for mark in metadata if isinstance(mark, Alias) for n in mark.names]


def judged(kind: type[P], values: Mapping[str, Any], prog: str) -> P:
    """Return settings of these values.

    Raises:
        Problem: values that a part's own rules refuse; each with its flag.
    """
    try:
        return kind(**values)
    except ValidationError as error:
        faults = [(e["loc"][0] if e["loc"] else "", e["msg"].removeprefix("Value error, ")) for e in error.errors()]
        what = "; ".join(f"{name}: {message}" if name else message for name, message in faults)
        where = " ".join(f"--{name}" for name, _ in faults if name) or prog
        raise Problem(what, where=where, remedy=f"see {prog} --help") from error
