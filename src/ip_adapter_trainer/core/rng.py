"""Counter streams: every random number is a pure function of (seed, purpose, counters).

There is no global generator and so nothing to store: a resumed run, another world size or another batch size draws
the same numbers for the same image. Philox is a counter-based generator (Salmon et al., "Parallel Random Numbers: As
Easy as 1, 2, 3", SC 2011), so independent keys give independent streams.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.random.bit_generator import ISeedSequence


def key(seed: int, purpose: str, *counters: int) -> int:
    """Return the 128-bit Philox key of a stream: a hash of the seed, the purpose's name and the counters."""
    return int.from_bytes(_digest(seed, purpose, counters), "little")


def stream(seed: int, purpose: str, *counters: int) -> np.random.Generator:
    """Return the random generator of one purpose at one place, which depends on these arguments alone.

    >>> float(stream(0, "noise", 7).random()) == float(stream(0, "noise", 7).random())
    True
    >>> float(stream(0, "noise", 7).random()) == float(stream(0, "timestep", 7).random())
    False
    """
    return np.random.Generator(np.random.Philox(_Keyed(_digest(seed, purpose, counters))))  # type: ignore[arg-type]


class _Keyed(ISeedSequence):
    """Hands Philox its key. `Philox(key=...)` asks the system for entropy first, to throw it away: 20 us a stream."""

    def __init__(self, digest: bytes) -> None:
        self._digest = digest

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> Any:
        """Return the two words of the key; Philox asks for no other."""
        return np.frombuffer(self._digest, "<u8")


def _digest(seed: int, purpose: str, counters: tuple[int, ...]) -> bytes:
    text = f"{seed}/{purpose}/" + "/".join([str(int(c)) for c in counters])
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
