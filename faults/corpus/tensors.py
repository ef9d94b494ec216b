"""Forged .safetensors files, made from a good one: headers that lie, and adapters that fit no model."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Header = dict[str, Any]
PROJECTION = "image_proj.proj.weight"
DEEP = "[" * 100_000


@dataclass(frozen=True)
class File:
    """A .safetensors file taken apart."""

    header: Header
    body: bytes

    @classmethod
    def read(cls, path: Path) -> File:
        """Takes a good one apart."""
        content = path.read_bytes()
        end = 8 + struct.unpack("<Q", content[:8])[0]
        return cls(json.loads(content[8:end]), content[end:])

    def packed(self) -> bytes:
        """The file's bytes."""
        return packed(json.dumps(self.header).encode(), self.body)

    def changed(self, name: str, **entry: Any) -> bytes:
        """With another entry for one tensor."""
        return File({**self.header, name: {**self.header[name], **entry}}, self.body).packed()

    def card(self, **metadata: str) -> bytes:
        """With other metadata, of which the weights' hash says nothing."""
        return File({**self.header, "__metadata__": {**self.header["__metadata__"], **metadata}}, self.body).packed()

    def renamed(self, old: str, new: str) -> bytes:
        """With `old` in tensors' names replaced by `new`, and no hash of them."""
        names = {name.replace(old, new): entry for name, entry in self.header.items() if name != "__metadata__"}
        return File(names, self.body).packed()


def packed(header: bytes, body: bytes = b"", length: int | None = None) -> bytes:
    """A header, of whatever length it claims, and a body."""
    return struct.pack("<Q", len(header) if length is None else length) + header + body


def lies(good: File) -> Iterator[tuple[str, bytes]]:
    """Files that are none."""
    head, body = json.dumps(good.header).encode(), good.body
    begin, end = good.header[PROJECTION]["data_offsets"]
    other = next(name for name in good.header if name not in ("__metadata__", PROJECTION))
    yield "empty", b""
    yield "a header of 2^63 bytes", packed(head, body, 2**63)
    yield "a header beyond the file", packed(head, body, len(head) + len(body) + 1)
    yield "a header of 40 MB", packed(head + b" " * (40 * 2**20), body)
    yield "a header of 900,000 tensors", packed(_crowd(900_000))
    yield "a header nested 100,000 deep", packed(DEEP.encode(), body)
    yield "a header that is no object", packed(b"[1, 2]", body)
    yield (
        "a name given twice",
        packed(head[:-1] + f', "{PROJECTION}": {json.dumps(good.header[other])}}}'.encode(), body),
    )
    yield (
        "tensors that overlap",
        good.changed(other, **{k: good.header[PROJECTION][k] for k in ("shape", "data_offsets")}),
    )
    yield "a tensor beyond the file", good.changed(PROJECTION, data_offsets=[begin + 2**40, end + 2**40])
    yield "a tensor that ends before it begins", good.changed(PROJECTION, data_offsets=[end, begin])
    yield "a negative offset", good.changed(PROJECTION, data_offsets=[-8, end])
    yield "an unknown dtype", good.changed(PROJECTION, dtype="F1024")
    yield "a dtype of another size", good.changed(PROJECTION, dtype="F64")
    yield "a shape of another size", good.changed(PROJECTION, shape=[1, 1])
    yield "a shape that overflows", good.changed(PROJECTION, shape=[2**33, 2**33])
    yield "a negative side", good.changed(PROJECTION, shape=[-1, 8])
    yield "a side that is no number", good.changed(PROJECTION, shape=["8", 8])
    yield "cut in the middle", good.packed()[: -len(body) // 2]
    yield "bytes behind the end", good.packed() + bytes(100)


def _crowd(count: int) -> bytes:
    """As many empty tensors, in 50 MB."""
    entries = (f'"t{n}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for n in range(count))
    return b"{" + ",".join(entries).encode() + b"}"


def misfits(good: File) -> Iterator[tuple[str, bytes]]:
    """Sound files that hold no adapter."""
    body, empty = good.body, {"dtype": "F32", "shape": [0, 10**12], "data_offsets": [len(good.body)] * 2}
    names = {name: entry for name, entry in good.header.items() if name != "__metadata__"}
    yield "no tensors", packed(b"{}")
    for digits in ("9" * 18 + "1", "1" * 5000, "01", "\u0661", "1\x1b[2J"):
        shown = digits if len(digits) < 30 and digits.isprintable() else f"of {len(digits)} letters"
        yield f"a layer numbered {shown}", good.renamed("ip_adapter.1.", f"ip_adapter.{digits}.")
    yield "a layer too many", File({**names, "ip_adapter.99.to_k_ip.weight": empty}, body).packed()
    yield "a projector that holds nothing", File({**names, "image_proj.more.weight": empty}, body).packed()
    yield "a projector without its norm", good.renamed("image_proj.norm.weight", "image_proj.norm.height")
    begin, end = names[PROJECTION]["data_offsets"]
    twin = {**names[PROJECTION], "data_offsets": [len(body), len(body) + end - begin]}
    twins = File({**names, f"module.{PROJECTION}": twin}, body + body[begin:end])
    yield "a name with and without a wrapper", twins.packed()
    whole = [len(body), len(body) + 4]
    scalar = {"dtype": "F32", "shape": [], "data_offsets": whole}
    yield (
        "a scalar for a layer",
        File({**names, PROJECTION: scalar, "spare": names[PROJECTION]}, body + bytes(4)).packed(),
    )
    rest = {name: entry for name, entry in names.items() if name != PROJECTION}
    yield "wrong hash", File({**good.header, **rest}, bytes([body[0] ^ 1]) + body[1:]).packed()
    yield "integers", _integers(good)


def _integers(good: File) -> bytes:
    kinds = {"F16": "I16", "F32": "I32", "BF16": "U16"}
    names = {name: entry for name, entry in good.header.items() if name != "__metadata__"}
    return File({n: {**e, "dtype": kinds[e["dtype"]]} for n, e in names.items()}, good.body).packed()


def cards(good: File) -> Iterator[tuple[str, bytes]]:
    """Good weights under a card that lies."""
    yield "a card of 10^9 tokens", good.card(variant_config='{"num_tokens": 1000000000}')
    yield "a card of text for tokens", good.card(variant_config='{"num_tokens": "many"}')
    yield "a card with an unknown setting", good.card(variant_config='{"__class__": "os.system"}')
    yield "a card nested 100,000 deep", good.card(variant_config=DEEP)
    yield "a card of no JSON", good.card(variant_config="!!python/object/apply:os.system [ls]")
    yield "a card of a list", good.card(variant_config="[1]")
    yield "a card of NaN", good.card(variant_config='{"num_tokens": NaN}')
    yield "a card's version of 5,000 digits", good.card(format_version="9" * 5000)
    yield "a card's step of 5,000 digits", good.card(step="9" * 5000)
    yield "a card's step that is no number", good.card(step="__import__('os').system('ls')")
    yield "a card's feature unknown", good.card(feature="../../etc/passwd")
