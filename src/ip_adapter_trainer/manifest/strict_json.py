"""JSON read strictly: what the standard reader lets pass in silence becomes a complaint about one element."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from ip_adapter_trainer.core.redact import one_line

_SPACE = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True)
class Complaint:
    """A fault of a row, before it is known where the row stands."""

    kind: str
    what: str
    remedy: str

    def __post_init__(self) -> None:
        for name in ("what", "remedy"):
            object.__setattr__(self, name, one_line(getattr(self, name)))


class StrictDecoder:
    """Decodes one JSON value after another; NaN, Infinity and keys given twice are collected as complaints.

    Usage::

        value, end, complaints = StrictDecoder().value_at(text, start)
    """

    def __init__(self) -> None:
        self._complaints: list[Complaint] = []
        self._decoder = json.JSONDecoder(
            object_pairs_hook=self._object,
            parse_constant=self._constant,
            parse_int=float,  # rows hold no integers, and int() of a million digits takes minutes
        )

    def value_at(self, text: str, start: int) -> tuple[Any, int, list[Complaint]]:
        """Return the value that begins at `start` or after white space there, its end, and what is wrong with it.

        Raises:
            json.JSONDecodeError: not JSON.
        """
        self._complaints = []
        start = skip_space(text, start)
        try:
            value, end = self._decoder.raw_decode(text, start)
        except RecursionError as error:
            raise json.JSONDecodeError("Nested too deeply", text, start) from error
        return value, end, self._complaints

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) < len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            self._complaints.append(Complaint("duplicate_key", f"the key {twice!r} is given twice", "remove one"))
        return table

    def _constant(self, name: str) -> None:
        self._complaints.append(Complaint("not_json", f"{name} is no JSON value", "write null, or remove the key"))


def skip_space(text: str, start: int) -> int:
    """Return the first place from `start` on that is no JSON white space."""
    found = _SPACE.match(text, start)
    return found.end() if found else start
