"""Seeded mutations of good files: of their bytes, of the values in their JSON, of the headers of their tensors."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from typing import Any

Mutation = Callable[[random.Random, bytes], bytes]

_TOKENS = [
    b"NaN", b"1e999", b"-1", b"9" * 30, b"9" * 5000, b"null", b"[" * 3000, b'{"a":' * 3000, b'"\\ud800"', b"\\u0000",
    b'"', b"\0" * 8, b"\xff" * 8, b"\xff\xfe", b"\xef\xbb\xbf", b"\n", b"\r\n", b",", b";", b"&a ", b"*a", b"<<: *a\n",
    b"!!int ", b"!!python/name:os.system ", b"!!binary ", b"? ", b"- ", b"---\n", b"%YAML 9.9\n", b"PK\x03\x04",
    b"\x80\x02", b"c__builtin__\neval\n",
]  # fmt: skip
_VALUES: list[Any] = [
    None, True, False, -1, 0, 1, 2**31, 2**63, 2**64, 10**30, -(2**63), 0.5, 1e308, "", "x", "\0", "\ud800", "x" * 3000,
    "\u0661", [], {}, [[]], [0, 0], [-1, 8], [2**40, 2**40], ["8"], {"a": {"a": {}}}, "../../etc/passwd", "/dev/zero",
    "F32", "U8",
]  # fmt: skip


def of_bytes(rng: random.Random, content: bytes) -> bytes:
    """Flips, cuts, repeats, overwrites or inserts some bytes, up to four times over."""
    for _ in range(rng.randint(1, 4)):
        begin = rng.randint(0, len(content))
        end = min(len(content), begin + rng.choice((1, 1, 2, 8, 100)))
        put = rng.choice(
            (rng.randbytes(1), rng.randbytes(end - begin), rng.choice(_TOKENS), b"", content[begin:end] * 2)
        )
        content = content[:begin] + put + content[end:]
    return content


def of_json(rng: random.Random, content: bytes) -> bytes:
    """Puts another value, key or copy into a JSON text at random places."""
    tree = json.loads(content)
    for _ in range(rng.randint(1, 3)):
        tree = _changed(rng, tree)
    text = json.dumps(tree, ensure_ascii=rng.random() < 0.5)
    return text.encode("utf-8", "surrogatepass")


def _changed(rng: random.Random, tree: Any) -> Any:
    """A tree with something else in one place."""
    if rng.random() < 0.15 or not isinstance(tree, (dict, list)) or not tree:
        return rng.choice(_VALUES)
    if isinstance(tree, list):
        place = rng.randrange(len(tree))
        return [*tree[:place], _changed(rng, tree[place]), *tree[place + rng.choice((0, 1, 1)) :]]
    key = rng.choice(list(tree))
    what = rng.random()
    if what < 0.1:
        return {other: value for other, value in tree.items() if other != key}
    if what < 0.2:
        return {**tree, str(rng.choice(_VALUES))[:200]: tree[key]}
    return {**tree, key: _changed(rng, tree[key])}


def of_tensors(rng: random.Random, content: bytes) -> bytes:
    """Changes the header of a .safetensors file as JSON, sometimes with a length that lies."""
    end = 8 + struct.unpack("<Q", content[:8])[0]
    header = of_json(rng, content[8:end])
    length = len(header) if rng.random() < 0.9 else rng.choice((0, 1, len(header) - 1, len(header) + 1, 2**40, 2**63))
    return struct.pack("<Q", length) + header + content[end:]
