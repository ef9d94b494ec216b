"""From the fields that a manifest gives for one row to a `Row`, or to complaints about it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ip_adapter_trainer.core.errors import did_you_mean
from ip_adapter_trainer.core.files import refusal
from ip_adapter_trainer.core.types import Row
from ip_adapter_trainer.data.strict_json import Complaint

_NEAR = 0.8  # of difflib: `prompt_image` is near `prompt_image_file`, `image_id` is not
_OTHER_NAMES = {  # of these columns in the sets of others
    "image_column": ("file_name", "filename", "file", "image", "image_path", "img", "path"),
    "text_column": ("caption", "captions", "prompt", "description", "tags"),
}
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_TYPE_NAMES = {dict: "an object", list: "an array", float: "a number", bool: "true or false", type(None): "null"}


@dataclass(frozen=True)
class Columns:
    """Names under which the fields of a row are found."""

    image: str
    text: str
    prompt_image: str

    @property
    def names(self) -> tuple[str, str, str]:
        """All three."""
        return self.image, self.text, self.prompt_image

    def misspelt(self, found: str) -> bool:
        """Whether a column that nothing reads looks like the optional one, which would be missed in silence."""
        return bool(difflib.get_close_matches(found, [self.prompt_image], cutoff=_NEAR)) and found not in self.names


def row_of(fields: Any, columns: Columns, *, allow_outside: bool) -> Row | list[Complaint]:
    """One row, or everything that is wrong with it."""
    if not isinstance(fields, dict):
        what = f"the row is {_type_name(fields)}, not an object"
        return [Complaint("wrong_type", what, f'write {{"{columns.image}": "...", "{columns.text}": "..."}}')]
    if not _is_well_formed(fields, columns):
        return [*_missing(fields, columns), *_wrong_types(fields, columns), *_misspelt(fields, columns)]
    row = Row(fields[columns.image], fields[columns.text], fields.get(columns.prompt_image) or None)
    if _is_clean(row, allow_outside):
        return row
    return [*_refused(row, columns, allow_outside), *_not_unicode(row, columns)]


def _is_well_formed(fields: Mapping[str, Any], columns: Columns) -> bool:
    """Whether nothing is missing, of a wrong type or misspelt, told in a microsecond and without saying what."""
    image, text, prompt = fields.get(columns.image), fields.get(columns.text), fields.get(columns.prompt_image)
    are_strings = type(image) is str and type(text) is str and (prompt is None or type(prompt) is str)
    return are_strings and (columns.prompt_image in fields or not _any_misspelt(tuple(fields), columns))


@lru_cache(maxsize=16)  # rows of one manifest have few sets of keys
def _any_misspelt(names: tuple[str, ...], columns: Columns) -> bool:
    return any(map(columns.misspelt, names))


def _is_clean(row: Row, allow_outside: bool) -> bool:
    """Whether no path is refused and all is Unicode."""
    image, text, prompt = row.image_file, row.text, row.prompt_image_file
    return (
        refusal(image, allow_outside=allow_outside) is None
        and (prompt is None or refusal(prompt, allow_outside=allow_outside) is None)
        and not any(value is not None and _has_surrogates(value) for value in (image, text, prompt))
    )


def missing_column(name: str, found: list[str], columns: Columns) -> Complaint:
    """The complaint about a column that must be there."""
    flag = "image_column" if name == columns.image else "text_column"
    unread = [other for other in found if other not in columns.names]
    near = difflib.get_close_matches(name, unread, n=1, cutoff=0.6)
    near += [other for other in _OTHER_NAMES[flag] if other in unread]
    if near:
        remedy = f"did you mean your {near[0]!r}? Rename it, or give --{flag} {near[0]}"
    else:
        empty = "" if name == columns.image else f" ({name!r} may be empty)"
        remedy = f"add it{empty}, or name the right one with --{flag}"
    return Complaint("missing_column", f"{name!r} is missing (found: {', '.join(found) or 'nothing'})", remedy)


def unknown_column(name: str, columns: Columns) -> Complaint:
    """The complaint about a column that seems to be a misspelt one."""
    remedy = f"{did_you_mean(name, [columns.prompt_image])} Rename it, or name it with --prompt_image_column"
    return Complaint("unknown_column", f"the column {name!r} is not known", remedy)


def _missing(fields: Mapping[str, Any], columns: Columns) -> list[Complaint]:
    found = [str(name) for name in fields]
    return [missing_column(name, found, columns) for name in (columns.image, columns.text) if name not in fields]


def _wrong_types(fields: Mapping[str, Any], columns: Columns) -> list[Complaint]:
    wrong = {name: fields[name] for name in columns.names if name in fields and not isinstance(fields[name], str)}
    if wrong.get(columns.prompt_image, "") is None:
        del wrong[columns.prompt_image]
    return [
        Complaint("wrong_type", f"{name!r} is {_type_name(value)}, not a string", "write it in quotes")
        for name, value in wrong.items()
    ]


def _misspelt(fields: Mapping[str, Any], columns: Columns) -> list[Complaint]:
    if columns.prompt_image in fields:
        return []
    return [unknown_column(name, columns) for name in fields if columns.misspelt(name)]


def _refused(row: Row, columns: Columns, allow_outside: bool) -> list[Complaint]:
    named = [(columns.image, row.image_file)]
    if row.prompt_image_file is not None:
        named.append((columns.prompt_image, row.prompt_image_file))
    refused = [(column, refusal(name, allow_outside=allow_outside)) for column, name in named]
    return [Complaint("unsafe_path", f"{column!r}: {why[0]}", why[1]) for column, why in refused if why is not None]


def _not_unicode(row: Row, columns: Columns) -> list[Complaint]:
    """Lone surrogates: what undecodable bytes and broken escapes become, and what nothing after can write."""
    values = zip(columns.names, (row.image_file, row.text, row.prompt_image_file or ""), strict=True)
    return [
        Complaint("bad_text", f"{column!r} holds characters that are not Unicode", "save the manifest as UTF-8")
        for column, value in values
        if _has_surrogates(value)
    ]


def _has_surrogates(value: str) -> bool:
    return not value.isascii() and _SURROGATE.search(value) is not None


def _type_name(value: Any) -> str:
    return _TYPE_NAMES.get(type(value), "a string" if isinstance(value, str) else type(value).__name__)
