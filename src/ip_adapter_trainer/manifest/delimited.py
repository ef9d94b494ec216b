"""Rows of a table in text: CSV, its cells separated by commas, semicolons or tabs, as the header line shows."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from ip_adapter_trainer.core.errors import Fault, Problem
from ip_adapter_trainer.manifest.entries import MAX_LINE_BYTES, Entry, lines_of
from ip_adapter_trainer.manifest.rows import Columns, missing_column, unknown_column
from ip_adapter_trainer.manifest.splits import METADATA, METADATA_IMAGE_KEY

DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs"}


def read_delimited(path: Path, columns: Columns, usual: str) -> Iterator[Entry]:
    """Yield the entries of a table whose header line names the columns; the `usual` delimiter is that of its suffix.

    Raises:
        Problem: the header lacks a column, or a line is too long.
    """
    lines = _text_lines(path)
    first = next(lines, "")
    delimiter = _delimiter(first, columns, usual)
    reader = csv.reader(chain([first], lines), delimiter=delimiter, strict=True)
    header = _header(path, reader, columns)
    while True:
        number = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield _broken(number, f"the line is not valid CSV: {error}", "check its quotes")
            continue
        if len(cells) == len(header):
            yield Entry(number, dict(zip(header, cells, strict=True)))
        elif cells:
            what = f"the line has {len(cells)} cells, the header {len(header)}"
            yield _broken(number, what, f"put texts that hold {DELIMITERS[delimiter]} in quotes")


def _broken(number: int, what: str, remedy: str) -> Entry:
    return Entry(number, None, (Fault("not_csv", what, "", remedy),))


def _delimiter(line: str, columns: Columns, usual: str) -> str:
    """The one that makes most of the wanted columns appear in the header, else most columns, else the usual one."""
    wanted, found = {*columns.names, METADATA_IMAGE_KEY}, {}
    for delimiter in DELIMITERS:
        try:
            cells = next(csv.reader([line], delimiter=delimiter), [])
        except csv.Error:
            cells = []
        found[delimiter] = len(wanted.intersection(cells)), len(cells), delimiter == usual
    return max(found, key=found.__getitem__)


def _header(path: Path, reader: Iterator[list[str]], columns: Columns) -> list[str]:
    try:
        header = next(reader, [])
    except csv.Error as error:
        raise Problem(f"the header is not valid CSV: {error}", where=f"{path}, line 1", remedy="correct it") from error
    if path.stem == METADATA and columns.image not in header:
        header = [columns.image if name == METADATA_IMAGE_KEY else name for name in header]
    faults = [
        *(missing_column(name, header, columns) for name in (columns.image, columns.text) if name not in header),
        *(unknown_column(name, columns) for name in header if columns.misspelt(name)),
        *(
            Fault("duplicate_key", f"the column {name!r} is there twice", "", "remove one")
            for name in columns.names
            if header.count(name) > 1
        ),
    ]
    if faults:
        raise Problem(faults[0].what, where=f"{path}, line 1", remedy=faults[0].remedy)
    return header


def _text_lines(path: Path) -> Iterator[str]:
    for number, line in lines_of(path):
        if line is None:
            what = f"a line is longer than {MAX_LINE_BYTES // 2**20} MB"
            raise Problem(what, where=f"{path}, line {number}", remedy="check the line breaks")
        yield line.decode("utf-8", "surrogateescape")  # the row that holds the bad bytes is found as a fault
