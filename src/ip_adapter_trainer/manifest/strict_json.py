"""JSON read strictly: what the standard reader lets pass in silence becomes a fault about one element."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

from ip_adapter_trainer.core.errors import Fault

_SPACE = re.compile(r"[ \t\r\n]*")


class StrictDecoder:
    """Decodes one JSON value after another; NaN, Infinity and keys given twice are collected as faults."""

    def __init__(self) -> None:
        self._faults: list[Fault] = []
        self._decoder = json.JSONDecoder(
            object_pairs_hook=self._object,
            parse_constant=self._constant,
            parse_int=float,  # rows hold no integers, and int() of a million digits takes minutes
        )

    def value_at(self, text: str, start: int) -> tuple[Any, int, list[Fault]]:
        """Return the value that begins at `start` or after white space there, its end, and what is wrong with it.

        Raises:
            json.JSONDecodeError: not JSON.
        """
        self._faults = []
        start = skip_space(text, start)
        try:
            value, end = self._decoder.raw_decode(text, start)
        except RecursionError as error:
            raise json.JSONDecodeError("Nested too deeply", text, start) from error
        return value, end, self._faults

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) < len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            self._faults.append(Fault("duplicate_key", f"the key {twice!r} is given twice", "", "remove one"))
        return table

    def _constant(self, name: str) -> None:
        self._faults.append(Fault("not_json", f"{name} is no JSON value", "", "write null, or remove the key"))


def skip_space(text: str, start: int) -> int:
    """Return the first place from `start` on that is no JSON white space."""
    found = _SPACE.match(text, start)
    return found.end() if found else start
