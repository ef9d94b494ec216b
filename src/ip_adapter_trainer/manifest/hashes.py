"""The recorded hashes of images, a list as `sha256sum` writes it: they tell a flipped bit that no decoder sees."""

from __future__ import annotations

import hashlib
import os
import posixpath
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ip_adapter_trainer.core.errors import Problem
from ip_adapter_trainer.images.decode import ImageFault
from ip_adapter_trainer.storage.digests import KEY, digest, places_of
from ip_adapter_trainer.storage.files import open_regular

_LINE = re.compile(rb"(\\?)([0-9a-fA-F]{64}) [ *](.+)")
_ESCAPED = re.compile(r"\\([\\nr])")
_MEANT = {"\\": "\\", "n": "\n", "r": "\r"}
_MAX_LINE_BYTES = 2**15
_SUM_BYTES = 32


class Hashes:
    """SHA-256 of each listed image, 48 bytes each; names are relative to the root of the image paths."""

    def __init__(self, path: Path, names: bytes, checksums: bytes) -> None:
        keys = np.frombuffer(names, KEY)
        order = np.argsort(keys)
        self._path, self._keys = path, keys[order]
        self._checksums = np.frombuffer(checksums, np.uint8).reshape(-1, _SUM_BYTES)[order]
        if (self._keys[1:] == self._keys[:-1]).any():
            raise Problem("a picture is listed twice", where=str(path), remedy="keep one line of each picture")

    @classmethod
    def of(cls, path: str) -> Hashes:
        """Return the hashes of a list, which each process reads once.

        Raises:
            Problem: it cannot be read, or a line is not as `sha256sum` writes it.
        """
        try:
            status = Path(path).stat()
        except OSError as error:
            raise _unreadable(path, error) from error
        return _read(path, status.st_size, status.st_mtime_ns)

    def __reduce__(self) -> tuple[Any, ...]:  # data workers read for themselves
        return Hashes.of, (str(self._path),)

    def __len__(self) -> int:
        return len(self._keys)

    def demand(self, name: str, content: bytes) -> None:
        """Demand that an image's file is the one that the list names.

        Raises:
            ImageFault: it is not, or the list does not name it.
        """
        place = int(places_of([_key(name)], self._keys)[0])
        if place < 0:
            what = f"{self._path.name} does not list the picture"
            raise ImageFault("not_listed", what, "list it, relative to the root of the image paths")
        if hashlib.sha256(content).digest() != self._checksums[place].tobytes():
            what = f"the file is not the one that {self._path.name} lists: its SHA-256 is another"
            raise ImageFault("changed", what, "replace the file by a sound copy, or list it anew")


@lru_cache(maxsize=1)
def _read(path: str, size_bytes: int, mtime_ns: int) -> Hashes:
    names, checksums = bytearray(), bytearray()
    for number, line in enumerate(_lines(path), 1):
        found = _LINE.fullmatch(line)
        if found is None or len(line) >= _MAX_LINE_BYTES:
            what = "the line is not as sha256sum writes it: 64 hexadecimal digits, two spaces, a name"
            raise Problem(what, where=f"{path}, line {number}", remedy="write it by `sha256sum FILES`")
        name = os.fsdecode(found[3])
        names += _key(_ESCAPED.sub(lambda escape: _MEANT[escape[1]], name) if found[1] else name)
        checksums += bytes.fromhex(found[2].decode())
    return Hashes(Path(path), bytes(names), bytes(checksums))


def _lines(path: str) -> Iterator[bytes]:
    try:
        with open_regular(Path(path)) as stream:
            while line := stream.readline(_MAX_LINE_BYTES):
                yield line.rstrip(b"\r\n")
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: str, error: OSError) -> Problem:
    what = f"the list of hashes cannot be read: {error.strerror}"
    return Problem(what, where=path, remedy="correct --image_hashes_file")


def _key(name: str) -> bytes:
    return digest(posixpath.normpath(name))
