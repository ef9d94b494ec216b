"""Files that are no picture, or one that must not be taken, each with the fault that a reader must name."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from faults.corpus.files import chunk, encoded, png_claiming, tiff_gray, tiff_tiled, with_scans
from faults.corpus.pictures import BLOCKS, GRAY, RGB, UNIT, H, W
from ip_adapter_trainer.images.decode import FORMATS, FaultKind


@dataclass(frozen=True)
class Broken:
    """A file that gives no picture.

    Attributes:
        what: its kind, in words.
        ending: of its name, with the dot.
        content: the file; None: there is none.
        kinds: the fault; several where libraries of other versions may see another one first.
        bomb: whether its harm is the memory or the time that it takes.
    """

    what: str
    ending: str
    content: bytes | None
    kinds: tuple[FaultKind, ...]
    bomb: bool = False


def broken() -> list[Broken]:
    """All of them, the same at every call."""
    return [*_none(), *_cut(), *_flipped(), *_shapes(), *_bombs()]


def _none() -> Iterator[Broken]:
    yield Broken("no file", ".png", None, ("missing_file",))
    yield Broken("an empty file", ".png", b"", ("empty_file",))
    for what, ending, content in (
        ("HTML named as PNG", ".png", b"<!DOCTYPE html><html><body>404 not found</body></html>"),
        ("SVG named as PNG", ".png", b"<svg xmlns='http://www.w3.org/2000/svg' width='64' height='64'/>"),
        ("PDF named as JPEG", ".jpg", b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\ntrailer\n<<>>\n%%EOF\n"),
        ("PostScript named as JPEG", ".jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\nshowpage\n"),
        ("an archive named as PNG", ".png", b"PK\5\6" + bytes(18)),
        ("a pickle named as PNG", ".png", b"cposix\nsystem\n(S'true'\ntR."),
        ("zeros named as JPEG", ".jpg", bytes(4096)),
    ):
        yield Broken(what, ending, content, ("not_a_picture",))
    for format, ending in (("ICO", ".png"), ("TGA", ".png"), ("JPEG2000", ".jpg"), ("PCX", ".bmp"), ("ICNS", ".png")):
        side_px = 32 if format == "ICNS" else 64
        yield Broken(f"a format off the list: {format}", ending, encoded(_plain(side_px), format), ("not_a_picture",))


def _plain(side_px: int) -> Image.Image:
    return Image.new("RGB", (side_px, side_px), (200, 30, 30))


def _cut() -> Iterator[Broken]:
    png, jpeg = encoded(RGB, "PNG"), encoded(RGB, "JPEG")
    cut: tuple[FaultKind, ...] = ("truncated", "damaged")
    yield Broken("PNG, its signature only", ".png", png[:8], cut)
    yield Broken("PNG, cut in its header", ".png", png[:20], cut)
    yield Broken("PNG, cut in its pixels", ".png", png[: len(png) // 2], cut)
    yield Broken("JPEG, its signature only", ".jpg", jpeg[:3], cut)
    yield Broken("JPEG, cut in its tables", ".jpg", jpeg[:200], cut)
    yield Broken("JPEG, cut in its pixels", ".jpg", jpeg[:-200], cut)
    for format, ending in (("WEBP", ".webp"), ("BMP", ".bmp"), ("TIFF", ".tif"), ("PPM", ".ppm")):
        content = encoded(RGB, format, **({"lossless": True} if format == "WEBP" else {}))
        yield Broken(f"{format}, cut in half", ending, content[: len(content) // 2], cut)
    if "AVIF" in FORMATS:
        content = encoded(RGB, "AVIF")
        yield Broken("AVIF, cut in half", ".avif", content[: len(content) // 2], cut)
    content = encoded(GRAY, "GIF")
    yield Broken("GIF, cut in half", ".gif", content[: len(content) // 2], cut)


def _flipped() -> Iterator[Broken]:
    for format, ending in (("PNG", ".png"), ("TIFF", ".tif")):
        content = bytearray(encoded(RGB, format, **({"compression": "tiff_deflate"} if format == "TIFF" else {})))
        content[500] ^= 1
        yield Broken(f"{format}, a bit of its pixels flipped", ending, bytes(content), ("damaged",))
    content = bytearray(encoded(RGB, "PNG"))
    content[19] ^= 64  # of the width, which the header's checksum covers
    yield Broken("PNG, a bit of its header flipped", ".png", bytes(content), ("damaged",))
    nan = np.where(UNIT > 0.5, np.nan, UNIT)
    yield Broken("float TIFF with NaN", ".tif", encoded(nan, "TIFF"), ("not_finite",))
    yield Broken(
        "float TIFF with infinity", ".tif", encoded(np.where(UNIT > 0.5, np.inf, UNIT), "TIFF"), ("not_finite",)
    )


def _shapes() -> Iterator[Broken]:
    yield Broken("one pixel", ".png", encoded(RGB[:1, :1], "PNG"), ("too_small",))
    yield Broken("a side too short", ".png", encoded(RGB[:15], "PNG"), ("too_small",))
    yield Broken("a side too long", ".png", encoded(np.zeros((20, 220), np.uint8), "PNG"), ("too_elongated",))
    yield Broken("no pixels", ".png", png_claiming(0, 0, zlib.compress(b"")), ("damaged", "too_small"))


def _bombs() -> Iterator[Broken]:
    pixels: tuple[FaultKind, ...] = ("too_many_pixels",)
    yield Broken("PNG of 12 KB for 100 million pixels", ".png", _one_bit_png(10_000), pixels, bomb=True)
    yield Broken("PNG of 8 KB for 64 million pixels", ".png", _one_bit_png(8_000), pixels, bomb=True)
    yield Broken("PNG that claims 8.6 billion pixels", ".png", png_claiming(2**31 - 1, 4, b""), pixels, bomb=True)
    text = b"".join(chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(2**20 - 1))) for _ in range(60))
    yield Broken("PNG with 60 MB of packed text", ".png", png_claiming(W, H, b"", extra=text), ("damaged",), bomb=True)
    profile = chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(2**27)))
    content = png_claiming(W, H, zlib.compress(bytes(H * (3 * W + 1))), extra=profile)
    yield Broken("PNG with a packed profile of 128 MB", ".png", content, ("damaged",), bomb=True)
    screen = b"GIF89a\xff\xff\xff\xff\x80\x00\x00" + bytes(6)
    frame = b",\0\0\0\0\xff\xff\xff\xff\0\x08\x02\x4c\x01\0;"
    yield Broken("GIF, screen of 4 billion pixels", ".gif", screen + frame, pixels, bomb=True)
    yield Broken("GIF, frame outgrows its screen", ".gif", screen.replace(b"\xff", b"\x20") + frame, pixels, bomb=True)
    yield Broken("WebP, canvas of 256 million pixels", ".webp", _claiming_webp(16_000), ("damaged", *pixels), bomb=True)
    yield Broken("TIFF of 3.6 billion pixels", ".tif", tiff_gray(bytes(64), 60_000, 60_000, bits=8), pixels, bomb=True)
    content = tiff_tiled(W, H, 40_000, zlib.compress(bytes(1000)))
    yield Broken("TIFF of 151 bytes, tile of 1.6 GB", ".tif", content, pixels, bomb=True)
    bmp = bytearray(encoded(RGB, "BMP"))
    bmp[18:26] = (60_000).to_bytes(4, "little") * 2
    yield Broken("BMP that claims 3.6 billion pixels", ".bmp", bytes(bmp), pixels, bomb=True)
    yield Broken("PPM that claims 3.6 billion pixels", ".ppm", b"P6 60000 60000 255\n", pixels, bomb=True)
    if "AVIF" in FORMATS:
        content = encoded(Image.new("L", (2100, 2100)), "AVIF", speed=10)
        yield Broken("AVIF of 1 KB for 4.4 million pixels", ".avif", content, pixels, bomb=True)
    jpeg = bytearray(encoded(BLOCKS, "JPEG"))
    at = jpeg.index(b"\xff\xc0") + 5
    jpeg[at : at + 4] = b"\xff\xff\xff\xff"
    yield Broken("JPEG that claims 4 billion pixels", ".jpg", bytes(jpeg), pixels, bomb=True)
    content = with_scans(encoded(Image.new("L", (1000, 1000)), "JPEG", progressive=True), 5000)
    yield Broken("JPEG of 5,000 scans", ".jpg", content, ("damaged",), bomb=True)


def _one_bit_png(side_px: int) -> bytes:
    rows = bytes(side_px * (-(-side_px // 8) + 1))
    return png_claiming(side_px, side_px, zlib.compress(rows, 9), colour_type=0, depth=1)


def _claiming_webp(side_px: int) -> bytes:
    frames = [Image.new("RGBA", (32, 32), colour) for colour in ("red", "lime")]
    data = bytearray(encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True))
    canvas = data.index(b"VP8X") + 12
    data[canvas : canvas + 6] = (side_px - 1).to_bytes(3, "little") * 2
    return bytes(data)
