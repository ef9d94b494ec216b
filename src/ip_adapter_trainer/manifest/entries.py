"""Entries, which every form of manifest gives one by one, and the reading of its file by lines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from ip_adapter_trainer.core.errors import Fault, Problem
from ip_adapter_trainer.storage.files import open_regular

MAX_LINE_BYTES = 2**20
BOM = b"\xef\xbb\xbf"

_UTF16 = (b"\xff\xfe", b"\xfe\xff")


class Entry(NamedTuple):
    """One place of a manifest. `fields` is an object if the entry is sound; texts may be lists."""

    number: int  # as people count: from 1
    fields: Any
    faults: tuple[Fault, ...] = ()
    detail: str = ""  # more about the place: the line of an element, the image of a caption


def lines_of(path: Path) -> Iterator[tuple[int, bytes | None]]:
    """Yield the number and the bytes of each line; None in place of a line over the limit, which is never held."""
    with open_manifest(path) as stream:
        number = 0
        while line := stream.readline(MAX_LINE_BYTES + 1):
            number += 1
            whole = len(line) <= MAX_LINE_BYTES
            yield number, line.removeprefix(BOM if number == 1 else b"") if whole else None
            while not line.endswith(b"\n") and not whole and (line := stream.readline(MAX_LINE_BYTES)):
                pass


def open_manifest(path: Path) -> BinaryIO:
    """Open a manifest's file.

    Raises:
        Problem: it cannot be read, or is UTF-16.
    """
    try:
        stream = open_regular(path)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        what = f"the manifest cannot be read: {reason}"
        raise Problem(what, where=str(path), remedy="correct --data_json_file") from error
    if stream.read(2) in _UTF16:
        stream.close()
        raise Problem("the manifest is UTF-16", where=str(path), remedy="save it as UTF-8")
    stream.seek(0)
    return stream
