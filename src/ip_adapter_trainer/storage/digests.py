"""Addresses: hashes of all that decides a thing, under which it is kept and by which alone it is found."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

KEY_BYTES = 16
KEY = np.dtype(f"S{KEY_BYTES}")  # compared with its trailing zeros left out, which keeps the order of whole keys
_MANY = 256  # from so many on it pays to search in order: each step then finds its neighbours in the cache


def digest(*parts: bytes | str | int) -> bytes:
    """Return the 16-byte key under which a thing is kept: a hash of all that decides it, each part with its length."""
    return hashlib.blake2b(framed(*parts), digest_size=KEY_BYTES).digest()


def framed(*parts: bytes | str | int) -> bytes:
    """Return the bytes that `digest` hashes for these parts: each with its length before it."""
    contents = [part if isinstance(part, bytes) else str(part).encode("utf-8", "surrogatepass") for part in parts]
    return b"".join([len(content).to_bytes(8, "little") + content for content in contents])


@dataclass(frozen=True)
class Digests:
    """Many keys that differ in one part only."""

    before: bytes = b""  # parts before the one that differs, framed
    after: bytes = b""  # and those after it

    def __call__(self, part: bytes) -> bytes:
        """The address with this part in its place."""
        return self.of((part,))[0]

    def of(self, parts: Iterable[bytes]) -> list[bytes]:
        """Return the key for each of the parts, put in its place between the others."""
        before, after, blake2b = self.before, self.after, hashlib.blake2b
        return [
            blake2b(before + len(part).to_bytes(8, "little") + part + after, digest_size=KEY_BYTES).digest()
            for part in parts
        ]


def places_of(keys: Sequence[bytes], among: NDArray[np.bytes_]) -> NDArray[np.int64]:
    """Return the first place of each key among sorted keys [N], as [keys]; -1 for one that is not there."""
    wanted = np.frombuffer(b"".join(keys), KEY)
    places = np.empty(len(wanted), np.int64)
    # Of many keys, asked in nearly their order: that of their first halves.
    order = np.argsort(wanted.view(">u8")[::2].astype(np.uint64)) if len(wanted) >= _MANY else slice(None)
    places[order] = np.searchsorted(among, wanted[order])
    there = places < len(among)
    there[there] = among[places[there]] == wanted[there]
    return np.where(there, places, -1)
