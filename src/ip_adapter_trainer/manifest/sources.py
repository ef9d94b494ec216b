"""The forms a manifest may have, each read entry by entry; a broken entry is a fault, a broken file a `Problem`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ip_adapter_trainer.core.errors import Fault, Problem
from ip_adapter_trainer.manifest.config import ReadConfig
from ip_adapter_trainer.manifest.delimited import read_delimited
from ip_adapter_trainer.manifest.entries import MAX_LINE_BYTES, Entry, lines_of, open_manifest
from ip_adapter_trainer.manifest.folder import read_folder
from ip_adapter_trainer.manifest.json_array import read_array
from ip_adapter_trainer.manifest.kohya import Listed
from ip_adapter_trainer.manifest.noticed import Noticed
from ip_adapter_trainer.manifest.rows import Columns
from ip_adapter_trainer.manifest.splits import METADATA, METADATA_IMAGE_KEY, metadata_in, trained_part
from ip_adapter_trainer.manifest.strict_json import StrictDecoder, skip_space


@dataclass(frozen=True)
class OpenedManifest:
    """An opened form: the file or folder that is read, what its entries are called, and the entries."""

    path: Path
    unit: str
    entries: Iterator[Entry]

    @property
    def root(self) -> Path:
        """The folder that image paths start from unless another is named."""
        return self.path if self.path.is_dir() else self.path.parent


def open_source(config: ReadConfig, columns: Columns, noticed: Noticed) -> OpenedManifest:
    """Open a manifest: a file by its suffix, a folder by what is in it, of which `noticed` takes what is no fault.

    Raises:
        Problem: not there, or of no known form. Reading on may raise it too, where the file breaks off.
    """
    path = Path(config.data_json_file)
    if not path.exists():
        raise Problem("there is no such manifest", where=str(path), remedy="correct --data_json_file")
    if path.is_dir():
        folder = trained_part(path, noticed, follows=config.allow_outside_root)
        metadata = metadata_in(folder)
        if metadata is None:
            return OpenedManifest(folder, "picture", read_folder(folder, columns, config, noticed))
        path = metadata
    form = _FORMS.get(path.suffix.lower())
    if form is None:
        remedy = f"give a file that ends in {', '.join(_FORMS)}, or a folder"
        raise Problem(f"a manifest cannot end in {path.suffix!r}", where=str(path), remedy=remedy)
    unit, read = form
    entries = read(path, columns, Path(config.data_root_path or path.parent))
    if path.stem == METADATA:
        entries = (_with_image_key(entry, columns.image) for entry in entries)
    return OpenedManifest(path, unit, entries)


def _read_json(path: Path, columns: Columns, root: Path) -> Iterator[Entry]:
    listed = Listed(root, columns)
    with open_manifest(path) as stream:
        for number, (line, key, value, faults) in enumerate(read_array(path, stream), 1):
            fields = value if key is None else listed.fields(key, value)
            yield Entry(number, fields, tuple(faults), f"line {line}")


def _read_jsonl(path: Path) -> Iterator[Entry]:
    decoder = StrictDecoder()
    for number, line in lines_of(path):
        if line is None:
            what = f"the line is longer than {MAX_LINE_BYTES // 2**20} MB"
            yield Entry(number, None, (Fault("line_too_long", what, "", "shorten it"),))
        elif line.strip():
            yield _entry_of_line(number, line, decoder)


def _entry_of_line(number: int, line: bytes, decoder: StrictDecoder) -> Entry:
    try:
        text = line.decode().rstrip("\r\n")
        fields, end, faults = decoder.value_at(text, 0)
        if skip_space(text, end) < len(text):
            raise json.JSONDecodeError("Text after the object", text, end)
        return Entry(number, fields, tuple(faults))
    except UnicodeDecodeError as error:
        what = f"the line is not UTF-8 (byte {error.start + 1})"
        return Entry(number, None, (Fault("bad_text", what, "", "save the manifest as UTF-8"),))
    except json.JSONDecodeError as error:
        what = f"the line is not valid JSON: {error.msg} (column {error.colno})"
        return Entry(number, None, (Fault("not_json", what, "", "write one JSON object a line"),))


def _with_image_key(entry: Entry, key: str) -> Entry:
    fields = entry.fields
    if isinstance(fields, dict) and key not in fields and METADATA_IMAGE_KEY in fields:
        fields = {key: fields[METADATA_IMAGE_KEY]} | fields
        del fields[METADATA_IMAGE_KEY]
    return entry._replace(fields=fields)


_FORMS: dict[str, tuple[str, Callable[[Path, Columns, Path], Iterator[Entry]]]] = {
    ".json": ("element", _read_json),
    ".jsonl": ("line", lambda path, columns, root: _read_jsonl(path)),
    ".csv": ("line", lambda path, columns, root: read_delimited(path, columns, ",")),
    ".tsv": ("line", lambda path, columns, root: read_delimited(path, columns, "\t")),
}
