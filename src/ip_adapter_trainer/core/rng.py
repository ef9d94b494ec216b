"""Counter streams: every random number is a pure function of (seed, purpose, counters).

There is no global generator and so nothing to store: a resumed run, another world size or another batch size draws
the same numbers for the same image. Philox is a counter-based generator (Salmon et al., "Parallel Random Numbers: As
Easy as 1, 2, 3", SC 2011), so independent keys give independent streams.
"""

from __future__ import annotations

import hashlib

import numpy as np


def key(seed: int, purpose: str, *counters: int) -> int:
    """The 128-bit Philox key of a stream: a hash of the seed, the purpose's name and the counters."""
    text = f"{seed}/{purpose}/" + "/".join(str(int(c)) for c in counters)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")


def stream(seed: int, purpose: str, *counters: int) -> np.random.Generator:
    """A generator for one purpose at one place.

    >>> float(stream(0, "noise", 7).random()) == float(stream(0, "noise", 7).random())
    True
    >>> float(stream(0, "noise", 7).random()) == float(stream(0, "timestep", 7).random())
    False
    """
    return np.random.Generator(np.random.Philox(key=key(seed, purpose, *counters)))
