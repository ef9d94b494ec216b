"""The sizes that a picture may have."""

from __future__ import annotations

from dataclasses import dataclass

MOST_MEGAPIXELS = 500.0  # that may be allowed: they take up to 6 GB to decode
MOST_PROFILE_BYTES = 10 * 2**20  # of a colour profile; the largest ones of printers have nine million


@dataclass(frozen=True)
class Limits:
    """Say what a picture may be; the defaults bound the memory of decoding one picture at about 1 GB."""

    max_pixels: int = 64_000_000
    max_file_bytes: int = 128 * 2**20
    min_side_px: int = 16
    max_aspect: float = 10.0  # longer side over shorter side
    max_pixels_per_byte: float = 250.0  # of the file; photographs have 1 to 40, drawings some more
