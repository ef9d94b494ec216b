"""Tables of fixed-size rows, each found by a digest: safetensors files that are whole when they are there.

A table is a folder of shards. A shard holds three tensors, `key` [R, 16] uint8 (digests), `value` [R, ...] of the
table's one shape and dtype and `sum` [R, 8] uint8 (checksums, by which bits that flip on a disk are found). A shard is
written beside its place and renamed, and is named after what it holds, so writers of any number never collide and
nothing but the shards says what a table holds. Readers sort the keys once; after that a row costs one binary search and
one copy out of a memory map, however many rows there are.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ip_adapter_trainer.core.errors import Problem, StorageProblem
from ip_adapter_trainer.storage.digests import KEY, KEY_BYTES, places_of
from ip_adapter_trainer.storage.disk import reason_of, refusals
from ip_adapter_trainer.storage.staging import staged_file

SUM_BYTES = 8
_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.uint8: "U8"}  # in safetensors
_MAX_HEADER_BYTES = 4096  # ours have about 200
_SEAL_BYTES, _SEAL_S = 256 * 2**20, 60.0  # a kill loses at most so much


@dataclass(frozen=True)
class TableKind:
    """The name of a table, and the shape and dtype of its rows."""

    name: str
    shape: tuple[int, ...]  # of one row
    dtype: torch.dtype

    @property
    def folder(self) -> str:
        """The folder of its shards, under the set's folder."""
        shape = "x".join(map(str, self.shape))
        return f"{self.name}/{shape}-{str(self.dtype).removeprefix('torch.')}"

    @property
    def value_bytes(self) -> int:
        """Bytes of a row."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        """Bytes of a row with its key and checksum."""
        return KEY_BYTES + SUM_BYTES + self.value_bytes


@dataclass(frozen=True)
class _Shard:
    path: Path
    rows: int
    starts: dict[str, int]  # of each tensor, bytes from the beginning of the file


class Table:
    """A table as it was when it was opened.

    At most `max_maps` shards are mapped at a time; each holds a file open.

    Raises:
        Problem: a shard that is none, is cut short, or holds other rows than the kind's.
    """

    def __init__(self, root: Path, kind: TableKind, max_maps: int = 64) -> None:
        self.kind, self._max_maps = kind, max_maps
        self._shards = [_open_shard(path, kind) for path in sorted((root / kind.folder).glob("[!.]*.safetensors"))]
        keys = np.frombuffer(b"".join(_read(shard, "key", KEY_BYTES) for shard in self._shards), KEY)
        checksums = np.frombuffer(b"".join(_read(shard, "sum", SUM_BYTES) for shard in self._shards), "<u8")
        order = np.argsort(keys, kind="stable")
        self._keys, self._checksums = keys[order], checksums[order]
        self._sound = np.zeros(len(keys), np.bool_)  # rows that were what was written when first read
        starts = np.cumsum([0, *(shard.rows for shard in self._shards)])
        self._shard = (np.searchsorted(starts, order, side="right") - 1).astype(np.int32)
        self._row = (order - starts[self._shard]).astype(np.int32)
        self._maps: OrderedDict[int, mmap.mmap] = OrderedDict()

    def __len__(self) -> int:
        return len(self._keys)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_maps": OrderedDict()}  # another process maps for itself

    @property
    def keys(self) -> NDArray[np.bytes_]:
        """All keys [rows], sorted; one that two writers wrote is there twice."""
        return self._keys

    def find(self, keys: Sequence[bytes]) -> NDArray[np.int64]:
        """Return the place of each key, [keys]: the first of several rows under it, -1 where there is none."""
        return places_of(keys, self._keys)

    def room(self, count: int) -> Tensor:
        """Return a tensor for `count` rows, [count, ...], with nothing in it yet."""
        return torch.empty((count, *self.kind.shape), dtype=self.kind.dtype)

    def fill(self, rows: Tensor, slots: Sequence[int], places: Sequence[int]) -> list[int]:
        """Copy the rows at places that `find` gave into slots of a tensor [B, ...] that `room` made.

        Returns:
            The places of rows that are damaged on the disk; each row is checked when it is read for the first time.
        """
        into, length = rows.view(len(rows), -1).view(torch.uint8).numpy(), self.kind.value_bytes
        found = [self._located(place) for place in places]
        for mapped, at in found:
            _fetch(mapped, at, length)
        for slot, (mapped, at) in zip(slots, found, strict=True):
            into[slot] = np.frombuffer(mapped, np.uint8, length, at)
        return self._damaged(into, slots, np.array(places, np.int64))

    def _damaged(self, rows: NDArray[np.uint8], slots: Sequence[int], places: NDArray[np.int64]) -> list[int]:
        """Looks at what was copied for the first time only: every time would cost a tenth of the rows a second."""
        fresh = np.flatnonzero(~self._sound[places])
        if not len(fresh):
            return []
        numbers, copied = places[fresh], rows[[slots[place] for place in fresh.tolist()]]
        sound = checksums_of(self._keys[numbers], copied) == self._checksums[numbers]
        self._sound[numbers[sound]] = True
        return numbers[~sound].tolist()

    def file_of(self, place: int) -> Path:
        """Return the shard that holds the row at a place."""
        return self._shards[int(self._shard[place])].path

    def _located(self, place: int) -> tuple[mmap.mmap, int]:
        number, row = int(self._shard[place]), int(self._row[place])
        return self._mapped(number), self._shards[number].starts["value"] + row * self.kind.value_bytes

    def values(self) -> NDArray[np.uint8]:
        """Return the bytes of all rows in the order of `keys`, [rows, bytes], in memory; for tables of small rows.

        Raises:
            Problem: some of them are damaged.
        """
        parts = [_read(shard, "value", self.kind.value_bytes) for shard in self._shards]
        whole = np.frombuffer(b"".join(parts), np.uint8).reshape(-1, self.kind.value_bytes)
        starts = np.cumsum([0, *(shard.rows for shard in self._shards)])
        values = whole[starts[self._shard] + self._row]
        damaged = np.flatnonzero(checksums_of(self._keys, values) != self._checksums)
        if len(damaged):
            raise _no_shard(self.file_of(int(damaged[0])), "rows of this shard are not what was written")
        return values

    def _mapped(self, number: int) -> mmap.mmap:
        mapped = self._maps.get(number)
        if mapped is None:
            mapped = self._maps[number] = _map(self._shards[number].path)
            if len(self._maps) > self._max_maps:
                self._maps.popitem(last=False)
        self._maps.move_to_end(number)
        return mapped


def _map(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if hasattr(mmap, "MADV_RANDOM"):  # not on Windows
        mapped.madvise(mmap.MADV_RANDOM)  # or the system reads far more than a row at every fault
    return mapped


def _fetch(mapped: mmap.mmap, at: int, length: int) -> None:
    """Has the disk read a whole row, where it is not in memory, and goes on: the rows of a batch are read together."""
    if hasattr(mmap, "MADV_WILLNEED"):
        page = at // mmap.PAGESIZE * mmap.PAGESIZE
        mapped.madvise(mmap.MADV_WILLNEED, page, at + length - page)


def checksums_of(keys: NDArray[np.bytes_], rows: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """Return the checksum of each row of bytes [R, n]: the sum of the row's words and the first word of its key.

    Words are of 64 bits where the length allows it, sums modulo 2^64. Any one bit that flips changes it, and so does a
    row of another key or a hole; a sum keeps up with copying from memory, which no hash does.
    """
    word_bytes = math.gcd(rows.shape[1], 8)
    return rows.view(f"<u{word_bytes}").sum(axis=1, dtype=np.uint64) + keys.view("<u8")[::2]


def _read(shard: _Shard, tensor: str, row_bytes: int) -> bytes:
    with shard.path.open("rb") as file:
        file.seek(shard.starts[tensor])
        return file.read(shard.rows * row_bytes)


def _open_shard(path: Path, kind: TableKind) -> _Shard:
    """Return the places of a shard's tensors once its header and size are right; allocate nothing before."""
    what = f"this file is no whole shard of {kind.folder}"
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if length <= _MAX_HEADER_BYTES else {}
        header.pop("__metadata__", None)
        if header.keys() == {"key", "value"}:
            what = f"this shard of {kind.folder} has no checksums: an earlier version wrote it"
        rows = header["key"]["shape"][0]
        expected = {
            "key": ("U8", [rows, KEY_BYTES]),
            "sum": ("U8", [rows, SUM_BYTES]),
            "value": (_DTYPES[kind.dtype], [rows, *kind.shape]),
        }
        found = {name: (entry["dtype"], entry["shape"]) for name, entry in header.items()}
        spans = {name: tuple(entry["data_offsets"]) for name, entry in header.items()}
        whole = type(rows) is int and rows > 0 and 8 + length + rows * kind.row_bytes == size
        if not whole or found != expected or not _fill(spans, rows, kind):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise _no_shard(path, what) from error
    return _Shard(path, rows, {name: 8 + length + begin for name, (begin, _) in spans.items()})


def _no_shard(path: Path, what: str) -> Problem:
    remedy = "remove it and run `ip-adapter prepare` again, which makes up for what it held"
    return Problem(what, where=str(path), remedy=remedy)


def _fill(spans: dict[str, tuple[int, int]], rows: int, kind: TableKind) -> bool:
    """Return whether the tensors fill a file in some order, without gap or overlap."""
    lengths = {"key": rows * KEY_BYTES, "sum": rows * SUM_BYTES, "value": rows * kind.value_bytes}
    at = 0
    for name in sorted(spans, key=lambda name: spans[name]):
        if spans[name] != (at, at + lengths[name]):
            return False
        at += lengths[name]
    return True


class TableWriter:
    """Adds rows to a table, a shard at a time: when there are 256 MB of them, or a minute after the first."""

    def __init__(self, root: Path, kind: TableKind) -> None:
        self._folder, self._kind = root / kind.folder, kind
        self._rows: dict[bytes, Tensor] = {}
        self._began_s = 0.0

    def add(self, key: bytes, value: Tensor) -> None:
        """Add a row, [...] of the kind's shape and dtype; it replaces a row of the same key that is not yet written.

        Raises:
            StorageProblem: a full shard could not be written.
        """
        assert value.shape == self._kind.shape and value.dtype == self._kind.dtype, self._kind
        self._began_s = self._began_s if self._rows else time.monotonic()
        self._rows[key] = value
        is_full = len(self._rows) * self._kind.row_bytes >= _SEAL_BYTES
        if is_full or time.monotonic() - self._began_s > _SEAL_S:
            self.seal()

    def seal(self) -> None:
        """Write the rows that were added as a shard.

        Raises:
            StorageProblem: the disk refused; the rows are kept for another try.
        """
        from safetensors.torch import save_file

        if not self._rows:
            return
        joined, values = b"".join(self._rows), torch.stack([*self._rows.values()])
        written = values.reshape(len(values), -1).view(torch.uint8).numpy()
        name = hashlib.blake2b(joined, digest_size=KEY_BYTES)
        name.update(written.data)
        checksums = checksums_of(np.frombuffer(joined, KEY), written).view(np.uint8).reshape(-1, SUM_BYTES)
        keys = torch.frombuffer(bytearray(joined), dtype=torch.uint8).view(-1, KEY_BYTES)
        final = self._folder / f"{name.hexdigest()}.safetensors"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with staged_file(final) as stage:
                save_file({"key": keys, "sum": torch.from_numpy(checksums), "value": values}, stage)
        except refusals() as error:
            what = f"a shard of the prepared set was not saved: {reason_of(error)}"
            remedy = "make room and run the same command again; it goes on where it was"
            raise StorageProblem(what, where=str(final), remedy=remedy) from error
        self._rows = {}
