"""The forms a manifest may have, each read entry by entry; a broken entry is a complaint, a broken file a `Problem`."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from ip_adapter_trainer.core.errors import Problem
from ip_adapter_trainer.core.files import open_regular, safe_join
from ip_adapter_trainer.data.json_array import read_array
from ip_adapter_trainer.data.rows import Columns, missing_column, unknown_column
from ip_adapter_trainer.data.strict_json import Complaint, StrictDecoder, skip_space
from ip_adapter_trainer.images.decode import SUFFIXES as PICTURE_SUFFIXES

MAX_LINE_BYTES = 2**20
MAX_CAPTION_BYTES = 2**16
METADATA_FILE = "metadata.jsonl"
METADATA_IMAGE_KEY = "file_name"  # what folders with a metadata.jsonl usually call it

_BOM = b"\xef\xbb\xbf"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


class Entry(NamedTuple):
    """What a manifest says at one place. `fields` is an object of strings if the entry is sound."""

    number: int  # as people count: from 1
    fields: Any
    complaints: tuple[Complaint, ...] = ()
    detail: str = ""  # more about the place: the line of an element, the picture of a caption


@dataclass(frozen=True)
class Source:
    """An opened form: the file or folder that is read, what its entries are called, and the entries."""

    path: Path
    unit: str
    entries: Iterator[Entry]


def open_source(path: Path, columns: Columns, *, allow_outside: bool = False) -> Source:
    """The entries of a manifest, by its suffix; a folder by what is in it, with `allow_outside` also through links.

    Raises:
        Problem: not there, or of no known form. Reading on may raise it too, where the file breaks off.
    """
    if path.is_dir():
        metadata = path / METADATA_FILE
        if metadata.exists():
            return Source(metadata, "line", _with_image_key(_read_jsonl(metadata), columns.image))
        return Source(path, "picture", _read_folder(path, columns, allow_outside))
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        remedy = f"give a file that ends in {', '.join(_READERS)}, or a folder"
        raise Problem(f"a manifest cannot end in {path.suffix!r}", where=str(path), remedy=remedy)
    return reader(path, columns)


def _read_json(path: Path) -> Iterator[Entry]:
    with _open(path) as stream:
        for number, (line, fields, complaints) in enumerate(read_array(path, stream), 1):
            yield Entry(number, fields, tuple(complaints), f"line {line}")


def _read_jsonl(path: Path) -> Iterator[Entry]:
    decoder = StrictDecoder()
    for number, line in _lines(path):
        if line is None:
            what = f"the line is longer than {MAX_LINE_BYTES // 2**20} MB"
            yield Entry(number, None, (Complaint("line_too_long", what, "shorten it"),))
        elif line.strip():
            yield _entry_of_line(number, line, decoder)


def _entry_of_line(number: int, line: bytes, decoder: StrictDecoder) -> Entry:
    try:
        text = line.decode().rstrip("\r\n")
        fields, end, complaints = decoder.value_at(text, 0)
        if skip_space(text, end) < len(text):
            raise json.JSONDecodeError("Text after the object", text, end)
        return Entry(number, fields, tuple(complaints))
    except UnicodeDecodeError as error:
        what = f"the line is not UTF-8 (byte {error.start + 1})"
        return Entry(number, None, (Complaint("bad_text", what, "save the manifest as UTF-8"),))
    except json.JSONDecodeError as error:
        what = f"the line is not valid JSON: {error.msg} (column {error.colno})"
        return Entry(number, None, (Complaint("not_json", what, "write one JSON object a line"),))


def _read_csv(path: Path, columns: Columns) -> Iterator[Entry]:
    reader = csv.reader(_csv_lines(path), strict=True)
    header = _csv_header(path, reader, columns)
    while True:
        number = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield Entry(
                number, None, (Complaint("not_csv", f"the line is not valid CSV: {error}", "check its quotes"),)
            )
            continue
        if len(cells) == len(header):
            yield Entry(number, dict(zip(header, cells, strict=True)))
        elif cells:
            what = f"the line has {len(cells)} cells, the header {len(header)}"
            yield Entry(number, None, (Complaint("not_csv", what, "put texts that hold commas in quotes"),))


def _csv_header(path: Path, reader: Iterator[list[str]], columns: Columns) -> list[str]:
    try:
        header = next(reader, [])
    except csv.Error as error:
        raise Problem(f"the header is not valid CSV: {error}", where=f"{path}, line 1", remedy="correct it") from error
    complaints = [
        *(missing_column(name, header, columns) for name in (columns.image, columns.text) if name not in header),
        *(unknown_column(name, columns) for name in header if columns.misspelt(name)),
        *(
            Complaint("duplicate_key", f"the column {name!r} is there twice", "remove one")
            for name in columns.names
            if header.count(name) > 1
        ),
    ]
    if complaints:
        raise Problem(complaints[0].what, where=f"{path}, line 1", remedy=complaints[0].remedy)
    return header


def _csv_lines(path: Path) -> Iterator[str]:
    for number, line in _lines(path):
        if line is None:
            what = f"a line is longer than {MAX_LINE_BYTES // 2**20} MB"
            raise Problem(what, where=f"{path}, line {number}", remedy="check the line breaks")
        yield line.decode("utf-8", "surrogateescape")  # the row that holds the bad bytes is found as a fault


def _read_folder(folder: Path, columns: Columns, allow_outside: bool) -> Iterator[Entry]:
    """Pictures in the order of their names, each with the text file beside it."""
    root = folder.resolve()
    for number, picture in enumerate(_pictures(folder), 1):
        name = picture.relative_to(folder).as_posix()
        caption = picture.with_suffix(".txt")
        try:
            inside = safe_join(root, caption.relative_to(folder).as_posix(), allow_outside=allow_outside)
            with open_regular(inside) as stream:
                text = stream.read(MAX_CAPTION_BYTES + 1)
        except Problem as problem:
            yield Entry(
                number, None, (Complaint("unsafe_path", f"{caption.name}: {problem.what}", problem.remedy),), name
            )
        except FileNotFoundError:
            complaint = Complaint("missing_caption", f"there is no {caption.name}", "write one; it may be empty")
            yield Entry(number, None, (complaint,), name)
        except OSError as error:
            complaint = Complaint("unreadable", f"{caption.name} cannot be read ({error.strerror})", "correct it")
            yield Entry(number, None, (complaint,), name)
        else:
            yield _captioned(number, name, caption.name, text, columns)


def _captioned(number: int, name: str, caption: str, text: bytes, columns: Columns) -> Entry:
    if len(text) > MAX_CAPTION_BYTES:
        what = f"{caption} is longer than {MAX_CAPTION_BYTES // 2**10} kB"
        return Entry(number, None, (Complaint("line_too_long", what, "shorten it"),), name)
    try:
        words = text.removeprefix(_BOM).decode().strip()
    except UnicodeDecodeError:
        return Entry(number, None, (Complaint("bad_text", f"{caption} is not UTF-8", "save it as UTF-8"),), name)
    return Entry(number, {columns.image: name, columns.text: words}, (), name)


def _pictures(folder: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and Path(name).suffix.lower() in PICTURE_SUFFIXES:
                yield Path(parent) / name


def _with_image_key(entries: Iterator[Entry], key: str) -> Iterator[Entry]:
    for entry in entries:
        fields = entry.fields
        if isinstance(fields, dict) and key not in fields and METADATA_IMAGE_KEY in fields:
            fields = {key: fields[METADATA_IMAGE_KEY]} | fields
            del fields[METADATA_IMAGE_KEY]
        yield entry._replace(fields=fields)


def _lines(path: Path) -> Iterator[tuple[int, bytes | None]]:
    """Number and bytes of each line; None in place of one over the limit, which is skipped, not held."""
    with _open(path) as stream:
        number = 0
        while line := stream.readline(MAX_LINE_BYTES + 1):
            number += 1
            whole = len(line) <= MAX_LINE_BYTES
            yield number, line.removeprefix(_BOM if number == 1 else b"") if whole else None
            while not line.endswith(b"\n") and not whole and (line := stream.readline(MAX_LINE_BYTES)):
                pass


def _open(path: Path) -> BinaryIO:
    try:
        stream = open_regular(path)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise Problem(
            f"the manifest cannot be read: {reason}", where=str(path), remedy="correct --data_json_file"
        ) from error
    if stream.read(2) in _UTF16:
        stream.close()
        raise Problem("the manifest is UTF-16", where=str(path), remedy="save it as UTF-8")
    stream.seek(0)
    return stream


_READERS: dict[str, Callable[[Path, Columns], Source]] = {
    ".json": lambda path, _: Source(path, "element", _read_json(path)),
    ".jsonl": lambda path, _: Source(path, "line", _read_jsonl(path)),
    ".csv": lambda path, columns: Source(path, "line", _read_csv(path, columns)),
}
