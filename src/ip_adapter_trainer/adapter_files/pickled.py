"""A check of what a .bin file holds: its pickle's instructions are read before any of them is executed.

`torch.load(weights_only=True)` executes no code, but it calls a few constructors with whatever arguments a file gives:
`bytearray(10**10)`, encodings of encodings, tuples of tuples as keys. A table of tensors needs none of them.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_MAX_PICKLE_BYTES = 64 * 2**20  # the pickle of a whole UNet has 200 KB
_LEGACY_PICKLES = 5  # magic number, version, the writer's sizes, the table, its storages; then come the bytes
_KINDS = "Float Double Half BFloat16 Long Int Short Char Byte Bool Untyped".split()  # noqa: SIM905
_ALLOWED = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    "torch.storage UntypedStorage",
    *(f"torch {kind}Storage" for kind in _KINDS),
}
_TUPLES = {"TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"}
_END_BYTES, _END64_BYTES = 22, 22 + 20 + 56  # an archive's last record; that, its locator and its 64-bit form


def demand_table(path: Path, is_archive: bool) -> None:
    """Refuse a .bin whose pickle names anything but tensors, or builds values out of shared tuples.

    Args:
        path: a file that `torch.load` would read.
        is_archive: True if it is a zip archive, as torch writes since 1.6.

    Raises:
        pickle.UnpicklingError: the pickle names something else.
        ValueError: the file is none of torch's, or an archive that is compressed or has another directory.
    """
    if not is_archive:
        with path.open("rb") as file:
            for _ in range(_LEGACY_PICKLES):
                _demand_plain(file)
        return
    _demand_one_directory(path)
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("its archive is compressed, which nothing that saves weights does")
        for entry in entries:
            if entry.orig_filename.lower().endswith(".pkl"):  # torch's reader takes DATA.PKL too
                if entry.file_size > _MAX_PICKLE_BYTES:
                    raise ValueError(f"its table of tensors has {entry.file_size:,} bytes")
                _demand_plain(io.BytesIO(archive.read(entry)))


def _demand_one_directory(path: Path) -> None:
    """Demand one directory, at the archive's end: else Python's reader and torch's could find different entries."""
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - _END64_BYTES))
        tail = file.read()
    end, (length, offset) = size - _END_BYTES, struct.unpack("<2L", tail[-10:-2])
    is_plain = tail[-_END_BYTES:].startswith(b"PK\5\6") and tail.endswith(b"\0\0")  # no comment after it
    if tail[-42:].startswith(b"PK\6\7"):
        end, (length, offset) = size - _END64_BYTES, struct.unpack("<2Q", tail[40:56])
        is_plain &= tail.startswith(b"PK\6\6") and struct.unpack("<Q", tail[-34:-26]) == (end,)
    if not is_plain or offset + length != end:
        raise ValueError("its archive does not end with its one directory, as all that saves weights does")


def _demand_plain(file: BinaryIO) -> None:
    for name in _named(file):
        if name not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {name}")


def _named(file: BinaryIO) -> Iterator[str]:
    """Yield every class and function that a pickle names, and a name for each instruction that tensors never need."""
    before, memo, tuples = "", 0, set[int]()
    for operation, argument, _ in pickletools.genops(file):
        if operation.name in ("GLOBAL", "INST"):
            yield str(argument)
        elif operation.name in ("STACK_GLOBAL", "EXT1", "EXT2", "EXT4"):
            yield operation.name
        elif operation.name.endswith("PUT") or operation.name == "MEMOIZE":
            memo = memo if operation.name == "MEMOIZE" else int(str(argument))
            if before in _TUPLES:
                tuples.add(memo)
            memo += 1
        elif operation.name.endswith("GET") and int(str(argument)) in tuples:
            yield "a tuple again"
        before = operation.name
