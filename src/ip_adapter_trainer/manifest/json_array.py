"""One JSON array, or object of objects, read element by element, of which only a window is ever held."""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ip_adapter_trainer.core.errors import Fault, Problem
from ip_adapter_trainer.manifest.strict_json import StrictDecoder, skip_space

MAX_JSON_BYTES = 2**30
MAX_ELEMENT_CHARACTERS = 2**20
_WINDOW_BYTES = 2**20

# Line it begins on, counted from 1; key if the file is an object; value; what is wrong with it.
Element = tuple[int, str | None, Any, list[Fault]]


def read_array(path: Path, stream: BinaryIO) -> Iterator[Element]:
    """Yield the elements of a file that is one array, or one object whose values are objects, in order.

    Raises:
        Problem: neither of these, not valid JSON, not UTF-8, or it or an element is too large; where it breaks off.
    """
    if os.fstat(stream.fileno()).st_size > MAX_JSON_BYTES:
        what = f"the manifest is larger than {MAX_JSON_BYTES // 2**30} GB"
        raise Problem(what, where=str(path), remedy="write it as .jsonl, which is read line by line")
    window, decoder, number = _Window(path, stream), StrictDecoder(), 0
    more = _enter(path, window)
    while more:
        number += 1
        try:
            (line, key, value, faults), more = _element(window, decoder)
        except json.JSONDecodeError as error:
            raise window.broken(error, number) from error
        if number == 1 and key is not None and not isinstance(value, dict):
            raise _no_rows(path)
        yield line, key, value, faults


def _no_rows(path: Path) -> Problem:
    remedy = "write [{...}, {...}]; one object a line belongs in a .jsonl file"
    return Problem("the manifest is not a JSON array of rows", where=str(path), remedy=remedy)


class _Window:
    """The part of the text that is being looked at; what lies before `position` goes when more is read."""

    def __init__(self, path: Path, stream: BinaryIO) -> None:
        self._path, self._stream = path, stream
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._lines_read, self._size_bytes = 1, _WINDOW_BYTES
        self._line, self._column = 1, 0  # of the window's first character: from 1; characters before it on its line
        self._counted, self._line_counted = 0, 1  # how far lines were counted, and the line there
        self.text, self.position, self.is_whole = "", 0, False
        self.end = "]"  # what follows the last element

    def extend(self) -> None:
        """Read on: as much as before, or twice as much if the text held was not enough for one element."""
        self._size_bytes = _WINDOW_BYTES if self.position else 2 * self._size_bytes
        data = self._stream.read(self._size_bytes)
        self.is_whole = not data
        try:
            more = self._decode(data, final=self.is_whole)
        except UnicodeDecodeError as error:
            line = self._lines_read + error.object.count(b"\n", 0, error.start)
            where = f"{self._path}, line {line}"
            raise Problem("the manifest is not UTF-8", where=where, remedy="save it as UTF-8") from error
        self._lines_read += data.count(b"\n")
        newline = self.text.rfind("\n", 0, self.position)
        self._column = self.position - newline - 1 if newline >= 0 else self._column + self.position
        self._line = self._line_counted = self.line()
        self.text, self.position, self._counted = self.text[self.position :] + more, 0, 0

    def line(self) -> int:
        """Return the line of `position`, counted from 1."""
        self._line_counted += self.text.count("\n", self._counted, self.position)
        self._counted = self.position
        return self._line_counted

    def broken(self, error: json.JSONDecodeError, number: int) -> Problem:
        """Return the problem to raise for an error in element `number`, found in the window's text."""
        column = error.colno + (self._column if error.lineno == 1 else 0)
        where = f"{self._path}, line {self._line + error.lineno - 1}, column {column} (element {number})"
        remedy = "correct it there; in a .jsonl file a broken line would cost one row only"
        what = "is not valid JSON" if self.is_whole else "has an element that is not valid JSON or longer than 1 MB"
        return Problem(f"the manifest {what}: {error.msg}", where=where, remedy=remedy)


def _enter(path: Path, window: _Window) -> bool:
    """Goes to the first element; whether there is one."""
    while True:
        start = skip_space(window.text, 0)
        inside = skip_space(window.text, start + 1)
        if inside < len(window.text) or window.is_whole or len(window.text) > MAX_ELEMENT_CHARACTERS:
            break
        window.extend()
    ends = {"[": "]", "{": "}"}
    if window.text[start : start + 1] not in ends:
        raise _no_rows(path)
    window.position, window.end = inside, ends[window.text[start]]
    return window.text[inside : inside + 1] != window.end


def _element(window: _Window, decoder: StrictDecoder) -> tuple[Element, bool]:
    """The element at the window's position, which moves to the next; the last value tells whether there is one.

    What fails to decode may only be cut off by the window's end, so it fails for good only once all is read, or so
    much that no element may be longer.
    """
    while True:
        try:
            key, start = _key(window, decoder)
            value, end, faults = decoder.value_at(window.text, start)
            following = _following(window, end)
            break
        except json.JSONDecodeError:
            if window.is_whole or len(window.text) - window.position > MAX_ELEMENT_CHARACTERS:
                raise
            window.extend()
    line = window.line()
    window.position = len(window.text) if following is None else following
    return (line, key, value, faults), following is not None


def _key(window: _Window, decoder: StrictDecoder) -> tuple[str | None, int]:
    """The key of the element at the window's position, None in an array, and where its value begins."""
    if window.end == "]":
        return None, window.position
    key, end, _ = decoder.value_at(window.text, window.position)
    mark = skip_space(window.text, end)
    if not isinstance(key, str) or window.text[mark : mark + 1] != ":":
        raise json.JSONDecodeError("Expecting a key and ':'", window.text, mark)
    return key, mark + 1


def _following(window: _Window, end: int) -> int | None:
    """Return the start of the element after the one that ends at `end`; None after the last, once all is read."""
    text = window.text
    mark = skip_space(text, end)
    after = skip_space(text, mark + 1)
    if text[mark : mark + 1] == ",":
        return after
    if text[mark : mark + 1] != window.end:
        raise json.JSONDecodeError(f"Expecting ',' or '{window.end}'", text, mark)
    if after < len(text) or not window.is_whole:
        raise json.JSONDecodeError("Text after the array", text, after)
    return None
