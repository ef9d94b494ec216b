"""Pickles that would leave a mark if they were executed, and pickles that only claim or build far too much."""

from __future__ import annotations

import io
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

GIB = 2**30


class _Call:
    """Pickles as a call."""

    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self._call, self._arguments = call, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self._call, self._arguments


def payloads(marker: Path) -> dict[str, bytes]:
    """Pickles by what they call; each would make the file `marker`."""
    import os
    import runpy
    import subprocess

    touch, code = f"touch {marker}", f"open({str(marker)!r}, 'w').close()"
    script = marker.with_suffix(".py")
    script.write_text(code)
    calls = {
        "os.system": _Call(os.system, touch),
        "exec": _Call(exec, code),
        "eval": _Call(eval, code),
        "subprocess": _Call(subprocess.call, ["touch", str(marker)]),
        "open": _Call(open, str(marker), "w"),
        "runpy": _Call(runpy.run_path, str(script)),
        "nested": _Call(pickle.loads, pickle.dumps(_Call(os.system, touch))),
    }
    made = {name: pickle.dumps(call, 2) for name, call in calls.items()}
    made["stack global"] = pickle.dumps(calls["os.system"], 4)
    made["inst"] = b"(S'" + touch.encode() + b"'\nios\nsystem\n."
    return made


def raw(payload: bytes) -> bytes:
    """The pickle alone."""
    return payload


def archive(payload: bytes, method: int = zipfile.ZIP_STORED) -> bytes:
    """The pickle in the place of the table in a file of torch since 1.6."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as packed:
        packed.writestr("archive/data.pkl", payload)
        packed.writestr("archive/byteorder", b"little")
        packed.writestr("archive/data/0", bytes(4096))
        packed.writestr("archive/version", b"3\n")
    return out.getvalue()


def compressed(payload: bytes) -> bytes:
    """As `archive`, compressed."""
    return archive(payload, zipfile.ZIP_DEFLATED)


def legacy(payload: bytes) -> bytes:
    """The pickle in the place of the table in a file of torch before 1.6."""
    head = [0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}]
    return b"".join(pickle.dumps(part, 2) for part in head) + payload + pickle.dumps([], 2)


def tar(payload: bytes) -> bytes:
    """The pickle in every member of the tar file that the first versions of torch wrote."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as packed:
        for name in ("storages", "tensors", "pickle"):
            member = tarfile.TarInfo(name)
            member.size = len(payload)
            packed.addfile(member, io.BytesIO(payload))
    return out.getvalue()


CONTAINERS = (raw, archive, compressed, legacy, tar)


def hostile(marker: Path) -> Iterator[tuple[str, bytes]]:
    """Every payload in some container and every container around some payload."""
    made = list(payloads(marker).items())
    for number, (name, payload) in enumerate(made):
        for container in (CONTAINERS[number % len(CONTAINERS)], archive):
            yield f"{name}, {container.__name__}", container(payload)


def bombs() -> Iterator[tuple[str, bytes]]:
    """Pickles that weights_only lets pass, and that would fill the memory or never end."""
    yield "bytearray of 8 GB", archive(_call("builtins bytearray", _int(8 * GIB)))
    text = b"c_codecs\nencode\nX" + struct.pack("<I", 2**20) + b"a" * 2**20 + b"X\x06\0\0\0utf-32\x86R"
    for _ in range(11):
        text = b"c_codecs\nencode\n" + text + b"X\x09\0\0\0hex_codec\x86R"
    quarter = archive(_call("builtins bytearray", _int(GIB // 4)))
    yield "a bytearray under DATA.PKL", quarter.replace(b"data.pkl", b"DATA.PKL")
    yield "a bytearray in another directory", _behind(quarter)
    yield "encodings of encodings", archive(b"\x80\x02" + text + b".")
    yield "tuples of tuples as a key", archive(_tuples(60))
    yield "tables that share tables", archive(_shared(9, 40))
    yield "tables in tables", archive(b"\x80\x02" + b"}U\x01a" * 5000 + b"}" + b"s" * 5000 + b".")
    yield "a table in itself", archive(b"\x80\x02}q\x00U\x01ah\x00s.")
    yield "a storage of 1 TB", archive(_tensor(2**38, (2**38,), (1,)))
    yield "a storage of 2^62", archive(_tensor(2**62, (1,), (1,)))
    yield "a legacy storage of 1 TB", legacy(_tensor(2**38, (2**38,), (1,)))
    yield "a shape that overflows", archive(_tensor(1024, (2**40, 2**40), (0, 0)))
    yield "one number read 10^12 times", archive(_tensor(1024, (10**6, 10**6), (0, 0)))
    yield "a negative stride", archive(_tensor(1024, (8, 8), (-8, 1)))
    yield "an offset beyond", archive(_tensor(1024, (8, 8), (8, 1), offset=2**40))
    yield "a tensor of 8 GB made by Tensor", archive(_call("torch Tensor", _int(2 * GIB)))
    size = 160 * 2**20
    yield "an archive that unpacks to 160 MB", compressed(b"\x80\x02X" + struct.pack("<I", size) + bytes(size) + b".")


def _behind(bomb: bytes) -> bytes:
    """An archive that torch reads as `bomb`, and Python as a harmless one whose directory stands behind it."""
    length, begin = struct.unpack("<2L", bomb[-10:-2])
    harmless = archive(pickle.dumps({}, 2))
    start = struct.unpack("<L", harmless[-6:-2])[0]
    listed, entry = bytearray(harmless[start:-22]), 0
    while entry < length:
        (place,) = struct.unpack_from("<L", listed, entry + 42)
        struct.pack_into("<L", listed, entry + 42, place + begin - start)  # Python adds what it takes for a prefix
        entry += 46 + sum(struct.unpack_from("<3H", listed, entry + 28))
    return bomb[:-22] + harmless[:start] + bytes(listed) + bomb[-22:]


def _int(number: int) -> bytes:
    return pickle.dumps(number, 2)[2:-1]


def _call(name: str, argument: bytes) -> bytes:
    module, _, function = name.partition(" ")
    return b"\x80\x02}U\x01ac" + f"{module}\n{function}\n".encode() + argument + b"\x85Rs."


def _tuples(levels: int) -> bytes:
    """2^levels values in a key of a few bytes: hashing it never ends."""
    body = b"K\x01q\x00"
    for level in range(levels):
        body += bytes([ord("h"), level]) + b"\x86q" + bytes([level + 1])
    return b"\x80\x02}" + body + b"K\x02s."


def _shared(levels: int, width: int) -> bytes:
    """width^levels tables in a file of a few KB: walking through them never ends."""
    body = b"}q\x00"
    for level in range(levels):
        entries = b"".join(b"U\x02" + f"{n:02d}".encode() + bytes([ord("h"), level]) for n in range(width))
        body += b"}(" + entries + b"uq" + bytes([level + 1])
    return b"\x80\x02" + body + b"."


def _tensor(elements: int, shape: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> bytes:
    """A table with one tensor, of whatever it claims."""
    storage = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpu" + _int(elements) + b"tQ"
    sizes = b"(" + b"".join(map(_int, shape)) + b"t(" + b"".join(map(_int, stride)) + b"t"
    rebuilt = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + _int(offset) + sizes
    rebuilt += b"\x89ccollections\nOrderedDict\n)RtR"
    return b"\x80\x02}X\x16\0\0\0image_proj.proj.weight" + rebuilt + b"s."
