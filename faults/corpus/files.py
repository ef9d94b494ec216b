"""Writers of picture files that Pillow does not write, or not so, and numpy's own idea of what a picture means."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Array = NDArray[Any]


def encoded(image: Image.Image | Array, format: str, **options: Any) -> bytes:
    """The bytes of a picture file."""
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, format, **options)
    return buffer.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    """A PNG chunk."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(samples: Array, colour_type: int, *, extra: bytes = b"") -> bytes:
    """A 16-bit PNG of [H, W] or [H, W, C] samples; colour type 0 gray, 2 RGB, 4 gray and alpha, 6 RGBA."""
    height, width = samples.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    return png_claiming(width, height, zlib.compress(rows), colour_type=colour_type, depth=16, extra=extra)


def png_claiming(
    width: int, height: int, data: bytes, *, colour_type: int = 2, depth: int = 8, extra: bytes = b""
) -> bytes:
    """A PNG whose header claims a size, with any compressed data."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def tiff_gray(data: bytes, width: int, height: int, *, bits: int, photometric: int = 1) -> bytes:
    """An uncompressed little-endian gray TIFF; photometric 0: white is zero."""
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1), (278, height)]
    tags.append((279, len(data)))
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return struct.pack("<2sHI", b"II", 42, 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4)


def over(colour: Array, alpha: Array, background: tuple[int, int, int]) -> Array:
    """[H, W, 3] and [H, W], both in 0..255, laid on a ground."""
    share = alpha[..., None] / 255
    return np.asarray(colour * share + np.array(background) * (1 - share))


def gray(samples: Array) -> Array:
    """[H, W] to three equal channels."""
    return np.repeat(samples[..., None], 3, axis=2)


def packed_12_bits(samples: Array) -> bytes:
    """[H, W] of 12 bits each, two in three bytes, as a TIFF holds them; W is even."""
    first, second = samples[:, ::2], samples[:, 1::2]
    return np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], axis=-1).astype(np.uint8).tobytes()


def pfm(samples: Array) -> bytes:
    """A gray float map: little-endian, the lowest line first."""
    return b"Pf\n%d %d\n-1.0\n" % samples.shape[::-1] + samples[::-1].astype("<f4").tobytes()


def tiff_tiled(width: int, height: int, tile_px: int, data: bytes) -> bytes:
    """A deflated 8-bit gray TIFF of one square tile."""
    tags = [(256, width), (257, height), (258, 8), (259, 8), (262, 1), (277, 1), (322, tile_px), (323, tile_px)]
    tags += [(324, 8), (325, len(data))]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return struct.pack("<2sHI", b"II", 42, 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4)


def with_scans(jpeg: bytes, count: int) -> bytes:
    """A progressive JPEG whose last scan is there so many times more."""
    start, end = jpeg.rindex(b"\xff\xda"), jpeg.rindex(b"\xff\xd9")
    return jpeg[:end] + jpeg[start:end] * count + jpeg[end:]
