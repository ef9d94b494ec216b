"""The rows of a manifest as a few kilobytes, by which a resumed run knows them again and finds the one that changed.

Rows lie in a table of `SIDE` columns. Beside a hash of all, which alone decides, there is a sum of the checksums of
each line of the table and of each column: where one row changed, one line and one column differ, and cross at it.
"""

from __future__ import annotations

import hashlib
import zlib
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

SIDE = 1024  # a million rows: 2,001 sums, 32 kB in a checkpoint


@dataclass(frozen=True)
class Fingerprint:
    """A summary of all rows, by which they are known again."""

    sha256: str  # over names, captions and prompt names in their order, hexadecimal; not over the images' bytes
    rows: int  # how many
    lines: NDArray[np.uint64]  # sum of each line's CRC-32, [ceil(rows / SIDE)] uint64
    columns: NDArray[np.uint64]  # sum of each column's, [SIDE] uint64

    def to_json(self) -> dict[str, Any]:
        """Return the fingerprint as JSON values."""
        sums = {name: getattr(self, name).astype("<u8").tobytes().hex() for name in ("lines", "columns")}
        return {"sha256": self.sha256, "rows": self.rows, **sums}

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> Fingerprint:
        """Read a fingerprint from the values that `to_json` gave."""
        lines, columns = (np.frombuffer(bytes.fromhex(saved[name]), "<u8") for name in ("lines", "columns"))
        return cls(saved["sha256"], saved["rows"], lines, columns)

    def differing(self, other: Fingerprint) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the numbers of the table's lines [L] and columns [C] that differ from another fingerprint's."""
        common = min(len(self.lines), len(other.lines))
        longer = np.arange(common, max(len(self.lines), len(other.lines)))
        lines = np.append(np.flatnonzero(self.lines[:common] != other.lines[:common]), longer)
        return lines, np.flatnonzero(self.columns != other.columns)

    def changed_row(self, other: Fingerprint) -> int | None:
        """Return the number of the one row that differs, counted from 0; None where it is not one alone."""
        lines, columns = self.differing(other)
        alone = self.rows == other.rows and len(lines) == len(columns) == 1
        return int(lines[0]) * SIDE + int(columns[0]) if alone else None

    def difference(self, other: Fingerprint) -> str:
        """Say in words how another fingerprint differs; rows are counted from 1 there."""
        if (row := self.changed_row(other)) is not None:
            return f"of {self.rows:,} rows one changed, row {row + 1:,}"
        lines, columns = self.differing(other)
        if not len(lines):
            return f"of {self.rows:,} rows some changed places"
        number = f"there were {self.rows:,} rows and are {other.rows:,}; " if self.rows != other.rows else ""
        first, last = int(lines[0]) * SIDE + 1, min((int(lines[-1]) + 1) * SIDE, max(self.rows, other.rows))
        least = "" if number else f", {max(len(lines), len(columns)):,} at least"
        return f"{number}all that changed is among rows {first:,} to {last:,}{least}"


class Digest:
    """Takes the rows one by one."""

    def __init__(self) -> None:
        self._whole = hashlib.sha256()
        self._line: list[bytes] = []  # of the table, that is being filled
        self._lines = array("Q")
        self._columns = np.zeros(SIDE, np.uint64)
        self._full = 0  # lines

    def add(self, row: bytes) -> None:
        """Take the next row."""
        self._line.append(row)
        if len(self._line) == SIDE:
            self._close_line()
            self._full += 1

    def _close_line(self) -> None:
        self._whole.update(b"".join(self._line))
        sums = np.fromiter(map(zlib.crc32, self._line), np.uint64, len(self._line))
        self._lines.append(int(sums.sum()))
        self._columns[: len(sums)] += sums
        self._line = []

    def fingerprint(self) -> Fingerprint:
        """Return the fingerprint of all rows; add none after it."""
        rows = self._full * SIDE + len(self._line)
        if self._line:
            self._close_line()
        return Fingerprint(self._whole.hexdigest(), rows, np.array(self._lines, np.uint64), self._columns)
