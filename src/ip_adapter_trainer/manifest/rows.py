"""From the fields that a manifest gives for one row to a `Row`, or to faults about it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ip_adapter_trainer.core.errors import Fault, did_you_mean
from ip_adapter_trainer.core.values import Row
from ip_adapter_trainer.storage.files import refusal

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
        """Return whether a column that nothing reads looks like the optional one, which would be missed in silence."""
        return bool(difflib.get_close_matches(found, [self.prompt_image], cutoff=_NEAR)) and found not in self.names


def row_of(fields: Any, columns: Columns, *, allow_outside: bool) -> Row | list[Fault]:
    """Return a row, or all that is wrong with it."""
    if not isinstance(fields, dict):
        what = f"the row is {_type_name(fields)}, not an object"
        return [Fault("wrong_type", what, "", f'write {{"{columns.image}": "...", "{columns.text}": "..."}}')]
    if not _is_well_formed(fields, columns):
        found = [str(name) for name in fields]
        missing = [missing_column(name, found, columns) for name in (columns.image, columns.text) if name not in fields]
        unread = [] if columns.prompt_image in fields else [name for name in fields if columns.misspelt(name)]
        return [*missing, *_wrong_types(fields, columns), *(unknown_column(name, columns) for name in unread)]
    row = Row(fields[columns.image], _text_of(fields[columns.text]), fields.get(columns.prompt_image) or None)
    if _is_clean(row, allow_outside):
        return row
    return [*_refused(row, columns, allow_outside), *_not_unicode(row, columns)]


def _is_well_formed(fields: Mapping[str, Any], columns: Columns) -> bool:
    """Return in a microsecond whether nothing is missing, of a wrong type or misspelt, without saying what."""
    image, text, prompt = fields.get(columns.image), fields.get(columns.text), fields.get(columns.prompt_image)
    has_text = type(text) is str or (columns.text in fields and _wrong_text(text) is None)
    are_right = type(image) is str and has_text and (prompt is None or type(prompt) is str)
    return are_right and (columns.prompt_image in fields or not _any_misspelt(tuple(fields), columns))


def _text_of(value: str | Sequence[str | None] | None) -> str | tuple[str, ...]:
    """Return the caption or captions that a sound value stands for: null is an empty one, a list of one is that one."""
    if isinstance(value, str) or value is None:
        return value or ""
    captions = tuple(caption or "" for caption in value)
    return captions[0] if len(captions) == 1 else captions


def _wrong_text(value: Any) -> tuple[str, str] | None:
    """Return what is wrong with a caption's value and what to do about it; None: it is sound."""
    if value is None or isinstance(value, str):
        return None
    if not isinstance(value, list):
        return f"is {_type_name(value)}, not a string", 'write the caption in quotes, or "" if there is none'
    strange = [one for one in value if one is not None and not isinstance(one, str)]
    if strange:
        return f"is an array that holds {_type_name(strange[0])}", "write each of its captions in quotes"
    return None if value else ("is an empty array", 'write "" if there is no caption')


def _wrong_path(value: Any) -> tuple[str, str] | None:
    """Return what is wrong with a path's value and what to do about it; None: it is a string."""
    if isinstance(value, str):
        return None
    return f"is {_type_name(value)}, not a string", "write the path of one picture in quotes"


@lru_cache(maxsize=16)  # rows of one manifest have few sets of keys
def _any_misspelt(names: tuple[str, ...], columns: Columns) -> bool:
    return any(map(columns.misspelt, names))


def _is_clean(row: Row, allow_outside: bool) -> bool:
    """Return whether no path is refused and all is Unicode."""
    image, prompt = row.image_file, row.prompt_image_file
    return (
        refusal(image, allow_outside=allow_outside) is None
        and (prompt is None or refusal(prompt, allow_outside=allow_outside) is None)
        and not any(map(_has_surrogates, (image, *row.captions, prompt or "")))
    )


def missing_column(name: str, found: list[str], columns: Columns) -> Fault:
    """Return the fault about a column that must be there."""
    flag = "image_column" if name == columns.image else "text_column"
    unread = [other for other in found if other not in columns.names]
    near = difflib.get_close_matches(name, unread, n=1, cutoff=0.6)
    near += [other for other in _OTHER_NAMES[flag] if other in unread]
    if near:
        remedy = f"did you mean your {near[0]!r}? Rename it, or give --{flag} {near[0]}"
    else:
        empty = "" if name == columns.image else f" ({name!r} may be empty)"
        remedy = f"add it{empty}, or name the right one with --{flag}"
    return Fault("missing_column", f"{name!r} is missing (found: {', '.join(found) or 'nothing'})", "", remedy)


def unknown_column(name: str, columns: Columns) -> Fault:
    """Return the fault about a column that seems to be a misspelt one."""
    remedy = f"{did_you_mean(name, [columns.prompt_image])} Rename it, or name it with --prompt_image_column"
    return Fault("unknown_column", f"the column {name!r} is not known", "", remedy)


def _wrong_types(fields: Mapping[str, Any], columns: Columns) -> list[Fault]:
    prompt = fields.get(columns.prompt_image)
    found = {
        columns.image: _wrong_path(fields.get(columns.image, "")),
        columns.text: _wrong_text(fields.get(columns.text)),
        columns.prompt_image: None if prompt is None else _wrong_path(prompt),
    }
    return [Fault("wrong_type", f"{name!r} {wrong[0]}", "", wrong[1]) for name, wrong in found.items() if wrong]


def _refused(row: Row, columns: Columns, allow_outside: bool) -> list[Fault]:
    named = [(columns.image, row.image_file)]
    if row.prompt_image_file is not None:
        named.append((columns.prompt_image, row.prompt_image_file))
    refused = [(column, refusal(name, allow_outside=allow_outside)) for column, name in named]
    return [Fault("unsafe_path", f"{column!r}: {why[0]}", "", why[1]) for column, why in refused if why is not None]


def _not_unicode(row: Row, columns: Columns) -> list[Fault]:
    """Lone surrogates: what undecodable bytes and broken escapes become, and what nothing after can write."""
    values = zip(columns.names, ((row.image_file,), row.captions, (row.prompt_image_file or "",)), strict=True)
    return [
        Fault("bad_text", f"{column!r} holds characters that are not Unicode", "", "save the manifest as UTF-8")
        for column, strings in values
        if any(map(_has_surrogates, strings))
    ]


def _has_surrogates(value: str) -> bool:
    return not value.isascii() and _SURROGATE.search(value) is not None


def _type_name(value: Any) -> str:
    return _TYPE_NAMES.get(type(value), "a string" if isinstance(value, str) else type(value).__name__)
