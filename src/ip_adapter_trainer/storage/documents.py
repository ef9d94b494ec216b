"""JSON and YAML that others wrote: bounded in size, depth and kind before anything is made of them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from ip_adapter_trainer.core.errors import Problem, first_line
from ip_adapter_trainer.core.settings import as_flags, demand_no_secrets
from ip_adapter_trainer.storage.files import open_regular

MAX_DOCUMENT_BYTES = 32 * 2**20  # an adapter's state in JSON has some hundred KB
MAX_SETTINGS_BYTES = 2**18  # a run's settings have 6 KB
_MAX_DEPTH = 3  # of settings: a mapping of lists


def read_text(path: Path, max_bytes: int) -> str:
    """Read a regular UTF-8 file.

    Raises:
        OSError: missing, no regular file, or not readable.
        ValueError: larger than `max_bytes`, or no UTF-8.
    """
    with open_regular(path) as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ValueError(f"more than {max_bytes:,} bytes")
    return content.decode("utf-8-sig")


def read_json(path: Path, max_bytes: int = MAX_DOCUMENT_BYTES) -> Any:
    """Read a JSON file and return its value; see `json_of` and `read_text`."""
    return json_of(read_text(path, max_bytes))


def json_of(text: str) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: no JSON, nested too deeply, or a number that is not finite.
    """
    try:
        return json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON value")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"the number {digits[:20]} is too large")
    return number


def yaml_of(text: str) -> Any:
    """Return the value of a YAML text of plain scalars, lists and mappings.

    Raises:
        ValueError: no YAML, a tag for anything else, an alias (a few of which can stand for billions of values), or
            nested too deeply.
    """
    import yaml

    depth = 0
    try:
        for event in yaml.parse(text, yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent) or depth > _MAX_DEPTH:
                what = "an alias" if isinstance(event, yaml.AliasEvent) else "values nested too deeply"
                number = event.start_mark.line + 1 if event.start_mark else 0
                raise ValueError(f"line {number} has {what}")
        return yaml.safe_load(text)
    except (LookupError, TypeError, AttributeError) as error:  # of constructors of PyYAML's, for tags without a value
        raise ValueError(f"a tag and its value do not go together ({type(error).__name__})") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}: " if mark else ""
        raise ValueError(f"{place}{getattr(error, 'problem', None) or first_line(error)}") from error


def read_yaml(path: str) -> dict[str, Any]:
    """Read settings from a YAML file, which is one flat mapping of setting to value.

    Raises:
        Problem: no such file, no YAML, or no mapping.
    """
    try:
        content = yaml_of(read_text(Path(path), MAX_SETTINGS_BYTES))
    except (OSError, ValueError) as error:
        remedy = "give a YAML file with one `name: value` a line"
        raise Problem(f"cannot read the settings: {error}", where=path, remedy=remedy) from error
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise Problem("the settings are no mapping of names", where=path, remedy="write one `name: value` a line")
    for name, value in content.items():  # they are given on as flags, for which no entry of a list may be taken
        entries = value if isinstance(value, list) else [value]
        if any(isinstance(entry, (list, dict)) for entry in entries):
            raise Problem(f"the value of {name!r} is nested", where=path, remedy="give a value, or a list of values")
        if isinstance(value, list) and any(str(entry).startswith("-") for entry in entries):
            raise Problem(f"an entry of {name!r} begins with '-'", where=path, remedy="write settings one a line")
    demand_no_secrets(as_flags(content))
    return content
