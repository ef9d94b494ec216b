"""Records of image files in a prepared set: under each name, the content that was read and the file's status then.

As git does, a file whose size and time have not changed is taken for the same without being read. Records are rows of
a table like any other; of several under one name the newest counts, so nothing is ever rewritten.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ip_adapter_trainer.cache.shards import Table, TableKind
from ip_adapter_trainer.core.values import Size
from ip_adapter_trainer.storage.digests import KEY_BYTES, Digests, framed, places_of

_LAYOUT = np.dtype(
    [
        ("file_bytes", "<u8"),
        ("mtime_ns", "<i8"),
        ("noted_ns", "<i8"),
        ("height_px", "<u4"),
        ("width_px", "<u4"),
        ("content", f"V{KEY_BYTES}"),
    ]
)
IMAGES = TableKind("pictures", (_LAYOUT.itemsize,), torch.uint8)
_UNREADABLE = bytes(KEY_BYTES)
_NAMES = Digests(framed("picture"))
_SETTLED_NS = 2_000_000_000  # a file younger than this when it was read may have changed since without a new time


def name_key(name: str) -> bytes:
    """Return the key under which an image is recorded, from its name as rows give it."""
    return _NAMES(name.encode("utf-8", "surrogatepass"))


@dataclass(frozen=True)
class Record:
    """An image file as it was when it was read."""

    file_bytes: int
    mtime_ns: int
    noted_ns: int  # when it was read
    size_px: Size  # of the upright image
    content: bytes  # hash of the file; zeros: no image could be read

    @classmethod
    def of(cls, status: os.stat_result, size_px: Size, content: bytes) -> Record:
        """Record an image that was read now."""
        return cls(status.st_size, status.st_mtime_ns, time.time_ns(), size_px, content)

    @classmethod
    def unreadable(cls) -> Record:
        """Record that no image can be read under a name now."""
        return cls(0, 0, time.time_ns(), (0, 0), _UNREADABLE)

    @property
    def is_sound(self) -> bool:
        """True where an image was read."""
        return self.content != _UNREADABLE

    def fits(self, status: os.stat_result) -> bool:
        """Return whether a file of this status surely holds what was read then."""
        same = (status.st_size, status.st_mtime_ns) == (self.file_bytes, self.mtime_ns)
        return same and self.mtime_ns < self.noted_ns - _SETTLED_NS

    def packed(self) -> Tensor:
        """Return the record as a row of the table, [48] uint8."""
        row = np.zeros(1, _LAYOUT)
        row[0] = (self.file_bytes, self.mtime_ns, self.noted_ns, *self.size_px, self.content)
        return torch.from_numpy(row.view(np.uint8))


class ImageIndex:
    """The newest record of each image, all in memory: 64 bytes each.

    Attributes:
        contents: hash of each image's file, [images].
        sizes_px: height and width of each, [images, 2]; zeros: no image could be read.

    Raises:
        Problem: a damaged shard.
    """

    def __init__(self, root: Path) -> None:
        table = Table(root, IMAGES)
        records = table.values().reshape(-1).view(_LAYOUT)
        order = np.lexsort((records["noted_ns"], table.keys))
        keys = table.keys[order]
        newest = np.append(keys[1:] != keys[:-1], True)[: len(keys)]
        self._keys, self._records = keys[newest], records[order[newest]]
        self.contents: NDArray[np.void] = self._records["content"]
        self.sizes_px = np.stack([self._records["height_px"], self._records["width_px"]], axis=1)

    def __len__(self) -> int:
        return len(self._keys)

    def places(self, names: Sequence[str]) -> NDArray[np.int64]:
        """Return the place of each name's record, [names]; -1 for a name of which nothing is known."""
        return places_of(_NAMES.of([name.encode("utf-8", "surrogatepass") for name in names]), self._keys)

    def find(self, names: Sequence[str]) -> list[Record | None]:
        """Return the record of each name, None where nothing is known of it."""
        return self.records(self.places(names))

    def records(self, places: NDArray[np.int64]) -> list[Record | None]:
        """Return the records at places [N] that `places` gave, None at -1."""
        records: list[Record | None] = [None] * len(places)
        known = np.flatnonzero(places >= 0)
        found = zip(known.tolist(), self._records[places[known]].tolist(), strict=True)
        for number, (file_bytes, mtime_ns, noted_ns, height, width, content) in found:
            records[number] = Record(file_bytes, mtime_ns, noted_ns, (height, width), content)
        return records
