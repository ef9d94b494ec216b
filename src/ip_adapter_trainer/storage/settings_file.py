"""Settings in a YAML file: one flat mapping."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ip_adapter_trainer.core.errors import Problem
from ip_adapter_trainer.core.settings import as_flags, demand_no_secrets
from ip_adapter_trainer.storage.documents import MAX_SETTINGS_BYTES, read_text, yaml_of


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
