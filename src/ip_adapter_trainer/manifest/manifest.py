"""The rows of a training set, each checked, and what is wrong with the others."""

from __future__ import annotations

import json
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from json.encoder import encode_basestring_ascii as quoted
from pathlib import Path
from typing import TYPE_CHECKING

from ip_adapter_trainer.core.errors import Fault, Problem
from ip_adapter_trainer.core.log import say
from ip_adapter_trainer.core.redact import one_line
from ip_adapter_trainer.core.values import Row
from ip_adapter_trainer.manifest.config import ReadConfig
from ip_adapter_trainer.manifest.faults import demand_usable
from ip_adapter_trainer.manifest.fingerprint import Digest, Fingerprint
from ip_adapter_trainer.manifest.noticed import Noticed
from ip_adapter_trainer.manifest.rows import Columns, row_of
from ip_adapter_trainer.manifest.sources import open_source
from ip_adapter_trainer.manifest.table import RowTable

if TYPE_CHECKING:
    from ip_adapter_trainer.runtime.launch import Runtime


@dataclass(frozen=True)
class Manifest:
    """The rows that were read. A row's number is its place in `rows`; faulty rows are not among them."""

    source: Path
    root: Path  # resolved; image paths start here
    rows: Sequence[Row]  # made on demand
    faults: tuple[Fault, ...]
    fingerprint: Fingerprint  # of the rows
    unread_columns: tuple[str, ...]  # of the first sound entry: columns that nothing reads
    unit: str  # name of a place: line, element, picture
    places: Sequence[int]  # of each row, counted from 1
    noticed: Noticed  # in its folder, and no fault: what was passed over

    @property
    def entries(self) -> int:
        """Rows that the manifest meant to give: sound ones and faulty ones."""
        return len(self.rows) + len({fault.where for fault in self.faults})

    def where(self, row: int) -> str:
        """Return the place of a row, as faults name it."""
        return _place(self.source, self.unit, self.places[row], self.rows[row].image_file)


def read_manifest(config: ReadConfig) -> Manifest:
    """Read every row; a broken row is a fault in the result.

    Raises:
        Problem: the manifest or its root cannot be read at all, or there is no row in it.
    """
    columns, noticed = Columns(config.image_column, config.text_column, config.prompt_image_column), Noticed()
    opened = open_source(config, columns, noticed)
    root = Path(config.data_root_path or opened.root)
    if not root.is_dir():
        raise Problem("the root of the image paths is no folder", where=str(root), remedy="correct --data_root_path")
    rows, digest = RowTable(), Digest()
    places, faults, unread = array("q"), list[Fault](), tuple[str, ...]()
    for entry in opened.entries:
        row = row_of(entry.fields, columns, allow_outside=config.allow_outside_root) if not entry.faults else []
        if isinstance(row, Row):
            unread = unread if rows else tuple(sorted(set(entry.fields) - set(columns.names)))
            rows.append(row)
            digest.add(_line(row))
            places.append(entry.number)
        else:
            where = _place(opened.path, opened.unit, entry.number, entry.detail)
            faults += [replace(fault, where=where) for fault in (*entry.faults, *row)]
    if not rows and not faults:
        what = "the manifest holds no rows" + (f" ({noticed.in_short()})" if noticed.counts else "")
        remedy = "add pictures of a kind that is read (PNG, JPEG), and captions"
        raise Problem(what, where=str(opened.path), remedy=remedy)
    root = root.resolve()
    return Manifest(opened.path, root, rows, tuple(faults), digest.fingerprint(), unread, opened.unit, places, noticed)


def usable_manifest(config: ReadConfig) -> Manifest:
    """Read the rows to work on, and print a line about what was noticed in their folder.

    Raises:
        Problem: see `read_manifest`.
        DataProblem: more rows are faulty than the settings allow; told before any model is loaded.
    """
    manifest = read_manifest(config)
    if manifest.noticed.counts:
        say(f"noticed in {config.data_json_file}: {manifest.noticed.in_short()} (`ip-adapter check` names them)")
    demand_usable(manifest.faults, manifest.entries, config.max_fault_rate)
    return manifest


def read_alike(config: ReadConfig, runtime: Runtime) -> Manifest:
    """Read the rows to work on, on every process; see `usable_manifest`.

    Raises:
        Problem: on all of them, also where they read other rows than the first one does.
    """
    with runtime.agreed():
        manifest = usable_manifest(config)
    first, *others = runtime.gathered(manifest.fingerprint)
    for rank, read in enumerate(others, 1):
        if read.sha256 != first.sha256:
            what = f"rank {rank} reads other rows than rank 0: {first.difference(read)}"
            raise Problem(what, where=str(manifest.source), remedy="give every machine the same file")
    return manifest


def _place(source: Path, unit: str, number: int, detail: str) -> str:
    return one_line(f"{source.name}, {unit} {number}" + (f" ({detail})" if detail else ""))


def _line(row: Row) -> bytes:
    """Return the bytes of a row that the fingerprint hashes: a JSON array of its fields, captions an array in it."""
    text = quoted(row.text) if isinstance(row.text, str) else json.dumps(row.text)
    prompt = "null" if row.prompt_image_file is None else quoted(row.prompt_image_file)
    return f"[{quoted(row.image_file)}, {text}, {prompt}]\n".encode()
