"""Readable pictures of every kind, each with the pixels that a reader must give, computed by numpy alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from faults.corpus.files import Array, chunk, encoded, gray, over, packed_12_bits, pfm, png, tiff_gray
from ip_adapter_trainer.images.decode import FORMATS

BACKGROUND = (10, 200, 90)  # what transparent pictures are laid on
GROUND_FLAG = "#0ac85a"
H, W = 24, 32

_CHANCE = np.random.default_rng(0)
RGB = _CHANCE.integers(0, 256, (H, W, 3), dtype=np.uint8)
ALPHA = _CHANCE.integers(0, 256, (H, W), dtype=np.uint8)
GRAY = RGB[..., 0]
DEEP = _CHANCE.integers(0, 65536, (H, W), dtype=np.uint16)
DEEP_RGBA = _CHANCE.integers(0, 65536, (H, W, 4), dtype=np.uint16)
TWELVE = _CHANCE.integers(0, 4096, (H, W), dtype=np.uint16)
UNIT = _CHANCE.random((H, W), dtype=np.float32)
SIGNED = _CHANCE.integers(-5_000_000, 9_000_000, (H, W), dtype=np.int32)
CMYK = _CHANCE.integers(0, 256, (H, W, 4), dtype=np.uint8)
LAB = np.stack([_CHANCE.integers(90, 200, (H, W)), *_CHANCE.integers(0, 16, (2, H, W))], -1).astype(np.uint8)
# Whole 8x8 blocks of the cube's corners: a JPEG keeps them to within rounding.
BLOCKS = np.kron(_CHANCE.integers(0, 2, (H // 8, W // 8, 3), dtype=np.uint8) * 255, np.ones((8, 8, 1), np.uint8))

UPRIGHT: dict[int, Callable[[Array], Array]] = {  # by the EXIF standard: what makes the stored picture stand upright
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a),
}


@dataclass(frozen=True)
class Sound:
    """A file that is a picture.

    Attributes:
        what: its kind, in words.
        ending: of its name, with the dot; not always that of its format.
        content: the file.
        pixels: [H, W, 3] in 0..255, upright, on `BACKGROUND`.
        frames: how many it has.
    """

    what: str
    ending: str
    content: bytes
    pixels: Array
    frames: int = 1


def sound() -> list[Sound]:
    """All of them, the same at every call."""
    avif = _avif() if "AVIF" in FORMATS else ()
    return [*_eight_bits(), *_transparent(), *_deep(), *_jpegs(), *avif, *_turned(), *_moving(), *_odd()]


def _eight_bits() -> Iterator[Sound]:
    bits, gray_rgb = GRAY > 127, gray(GRAY)
    yield Sound("RGB PNG", ".png", encoded(RGB, "PNG"), RGB)
    yield Sound("RGB BMP", ".bmp", encoded(RGB, "BMP"), RGB)
    yield Sound("RGB TIFF, LZW", ".tif", encoded(RGB, "TIFF", compression="tiff_lzw"), RGB)
    yield Sound("RGB TIFF, deflated", ".tiff", encoded(RGB, "TIFF", compression="tiff_deflate"), RGB)
    yield Sound("RGB PPM", ".ppm", encoded(RGB, "PPM"), RGB)
    yield Sound("plain PPM", ".ppm", b"P3 %d %d 255\n" % (W, H) + b" ".join(b"%d" % v for v in RGB.flat), RGB)
    yield Sound("RGB WebP, lossless", ".webp", encoded(RGB, "WEBP", lossless=True), RGB)
    yield Sound("gray PNG", ".png", encoded(GRAY, "PNG"), gray_rgb)
    yield Sound("gray BMP", ".bmp", encoded(GRAY, "BMP"), gray_rgb)
    yield Sound("gray GIF", ".gif", encoded(GRAY, "GIF"), gray_rgb)
    yield Sound("one bit PNG", ".png", encoded(Image.fromarray(bits), "PNG"), gray(bits * 255))
    fax = encoded(Image.fromarray(bits), "TIFF", compression="group4")
    yield Sound("one bit TIFF, fax", ".tif", fax, gray(bits * 255))
    palette, colours, numbers = _palette()
    yield Sound("palette PNG", ".png", encoded(palette, "PNG"), colours[numbers])
    yield Sound("palette PNG, 4 bits", ".png", encoded(palette, "PNG", bits=4), colours[numbers])
    yield Sound("palette BMP", ".bmp", encoded(palette, "BMP"), colours[numbers])
    yield Sound("palette TIFF", ".tif", encoded(palette, "TIFF"), colours[numbers])
    ink = (255 - CMYK[..., :3]) * ((255 - CMYK[..., 3:]) / 255)
    yield Sound("CMYK TIFF", ".tif", encoded(Image.fromarray(CMYK, "CMYK"), "TIFF"), ink)
    lab = Image.fromarray(LAB, "LAB")
    yield Sound("CIELAB TIFF", ".tif", encoded(lab, "TIFF"), _lab_to_rgb(np.asarray(lab)))


def _transparent() -> Iterator[Sound]:
    rgba, rgba_rgb = np.dstack([RGB, ALPHA]), over(RGB, ALPHA, BACKGROUND)
    yield Sound("RGBA PNG", ".png", encoded(rgba, "PNG"), rgba_rgb)
    yield Sound("RGBA WebP", ".webp", encoded(rgba, "WEBP", lossless=True, exact=True), rgba_rgb)
    yield Sound("RGBA TIFF", ".tif", encoded(rgba, "TIFF"), rgba_rgb)
    yield Sound(
        "gray and alpha PNG", ".png", encoded(np.dstack([GRAY, ALPHA]), "PNG"), over(gray(GRAY), ALPHA, BACKGROUND)
    )
    palette, colours, numbers = _palette()
    opacity = np.linspace(0, 255, 16).astype(np.uint8)
    shown = over(colours[numbers], opacity[numbers], BACKGROUND)
    yield Sound("palette PNG, opacities", ".png", encoded(palette, "PNG", transparency=opacity.tobytes()), shown)
    shown = np.where((numbers == 5)[..., None], BACKGROUND, colours[numbers])
    yield Sound("palette PNG, one clear", ".png", encoded(palette, "PNG", transparency=5), shown)
    yield Sound("palette GIF, one clear", ".gif", encoded(palette, "GIF", transparency=5), shown)
    value = int(GRAY[3, 4])
    shown = np.where(np.equal(GRAY, value)[..., None], BACKGROUND, gray(GRAY))
    yield Sound("gray PNG, one value clear", ".png", encoded(GRAY, "PNG", transparency=value), shown)
    colour = RGB[3, 4]
    shown = np.where((colour == RGB).all(-1, keepdims=True), BACKGROUND, RGB)
    yield Sound("RGB PNG, one colour clear", ".png", encoded(RGB, "PNG", transparency=tuple(colour.tolist())), shown)
    one = np.where((DEEP[3, 4] == DEEP)[..., None], BACKGROUND, gray(DEEP / 257))
    content = png(DEEP, 0, extra=chunk(b"tRNS", int(DEEP[3, 4]).to_bytes(2, "big")))
    yield Sound("16-bit gray PNG, one value clear", ".png", content, one)
    deep = DEEP_RGBA[..., :3]
    content = png(deep, 2, extra=chunk(b"tRNS", deep[3, 4].astype(">u2").tobytes()))
    shown = np.where((deep == deep[3, 4]).all(-1, keepdims=True), BACKGROUND, deep / 257)
    yield Sound("16-bit RGB PNG, one colour clear", ".png", content, shown)


def _deep() -> Iterator[Sound]:
    deep_gray = gray(DEEP / 257)
    yield Sound("16-bit gray PNG", ".png", encoded(DEEP, "PNG"), deep_gray)
    yield Sound("16-bit gray TIFF", ".tif", encoded(DEEP, "TIFF"), deep_gray)
    yield Sound("16-bit gray PGM", ".pgm", encoded(DEEP, "PPM"), deep_gray)
    yield Sound("16-bit RGB PNG", ".png", png(DEEP_RGBA[..., :3], 2), DEEP_RGBA[..., :3] / 257)
    # Pillow keeps the upper byte of each: under 1 off for colour alone, under 2 for colour and alpha together.
    kept = over(DEEP_RGBA[..., :3] >> 8, DEEP_RGBA[..., 3] >> 8, BACKGROUND)
    yield Sound("16-bit RGBA PNG", ".png", png(DEEP_RGBA, 6), kept)
    kept = over(gray(DEEP_RGBA[..., 0] >> 8), DEEP_RGBA[..., 3] >> 8, BACKGROUND)
    yield Sound("16-bit gray and alpha PNG", ".png", png(DEEP_RGBA[..., [0, 3]], 4), kept)
    dark = tiff_gray(DEEP.astype("<u2").tobytes(), W, H, bits=16, photometric=0)
    yield Sound("16-bit TIFF, white is zero", ".tif", dark, gray(255 - DEEP / 257))
    yield Sound("12-bit TIFF", ".tif", tiff_gray(packed_12_bits(TWELVE), W, H, bits=12), gray(TWELVE / 4095 * 255))
    yield Sound("32-bit TIFF, signed", ".tif", encoded(SIGNED, "TIFF"), _stretched(SIGNED))
    yield Sound("float TIFF in 0..1", ".tif", encoded(UNIT, "TIFF"), gray(UNIT * 255))
    yield Sound("float TIFF beyond", ".tif", encoded(UNIT * 9 - 3, "TIFF"), _stretched(UNIT))
    yield Sound("float TIFF of one value beyond", ".tif", encoded(UNIT * 0 + 7, "TIFF"), np.full((H, W, 3), 128))
    yield Sound("float PFM in 0..1", ".pnm", pfm(UNIT), gray(UNIT * 255))


def _jpegs() -> Iterator[Sound]:
    fine = {"quality": 100, "subsampling": 0}
    yield Sound("JPEG", ".jfif", encoded(BLOCKS, "JPEG", **fine), BLOCKS)
    yield Sound("progressive JPEG", ".jpeg", encoded(BLOCKS, "JPEG", progressive=True, **fine), BLOCKS)
    yield Sound("gray JPEG", ".jpg", encoded(BLOCKS[..., 0], "JPEG", quality=100), gray(BLOCKS[..., 0]))
    ink = Image.fromarray(np.dstack([255 - BLOCKS, np.zeros((H, W), np.uint8)]), "CMYK")
    yield Sound("CMYK JPEG", ".jpg", encoded(ink, "JPEG", **fine), BLOCKS)
    luma = Image.fromarray(BLOCKS).convert("YCbCr")
    yield Sound("YCbCr TIFF", ".tif", encoded(luma, "TIFF"), _ycbcr_to_rgb(np.asarray(luma)))
    boxed = encoded(BLOCKS[..., 0], "TIFF", compression="jpeg", quality=100)
    yield Sound("TIFF of JPEG", ".tif", boxed, gray(BLOCKS[..., 0]))


def _avif() -> Iterator[Sound]:
    gray_blocks = BLOCKS[..., 0]
    yield Sound("gray AVIF", ".avif", encoded(gray_blocks, "AVIF", quality=100), gray(gray_blocks))
    turned = encoded(gray_blocks, "AVIF", quality=100, exif=_exif(6))
    yield Sound("AVIF, orientation 6", ".avif", turned, UPRIGHT[6](gray(gray_blocks)))
    frames = [Image.new("L", (W, H), level) for level in (255, 0)]
    several = encoded(frames[0], "AVIF", save_all=True, append_images=frames[1:], quality=100)
    yield Sound("AVIF of several frames", ".avif", several, np.full((H, W, 3), 255), frames=2)


def _turned() -> Iterator[Sound]:
    for turn, upright in UPRIGHT.items():
        yield Sound(f"PNG, orientation {turn}", ".png", _turned_file("PNG", turn), upright(BLOCKS))
    for format, ending, turn in (("JPEG", ".jpg", 6), ("TIFF", ".tif", 8), ("WEBP", ".webp", 5)):
        yield Sound(f"{format}, orientation {turn}", ending, _turned_file(format, turn), UPRIGHT[turn](BLOCKS))
    yield Sound("PNG, an orientation that is none", ".png", _turned_file("PNG", 9), BLOCKS)
    broken = encoded(RGB, "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff nonsense")
    yield Sound("PNG, broken EXIF", ".png", broken, RGB)


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def _turned_file(format: str, orientation: int) -> bytes:
    options: dict[str, dict[str, Any]] = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}
    return encoded(BLOCKS, format, exif=_exif(orientation), **options.get(format, {}))


def _moving() -> Iterator[Sound]:
    frames = [Image.new("RGB", (W, H), colour) for colour in ("red", "lime", "blue")]
    first = np.asarray(frames[0])
    for format, ending in (("GIF", ".gif"), ("PNG", ".png"), ("WEBP", ".webp"), ("TIFF", ".tif")):
        options = {"lossless": True} if format == "WEBP" else {}
        content = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
        yield Sound(f"{format} of several frames", ending, content, first, frames=3)
    many = [Image.new("P", (W, H), number % 2) for number in range(2000)]
    for frame in many:
        frame.putpalette([255, 0, 0, 0, 0, 255])
    content = encoded(many[0], "GIF", save_all=True, append_images=many[1:], disposal=2)
    yield Sound("GIF of 2,000 frames", ".gif", content, first, frames=2000)


def _odd() -> Iterator[Sound]:
    yield Sound("PNG named as JPEG", ".jpg", encoded(RGB, "PNG"), RGB)
    yield Sound("WebP named as PNG", ".png", encoded(RGB, "WEBP", lossless=True), RGB)
    yield Sound("PNG with an archive behind it", ".png", encoded(RGB, "PNG") + b"PK\5\6" + bytes(18), RGB)
    flipped = bytearray(encoded(RGB, "BMP"))
    flipped[-1] ^= 1  # of the upper right pixel: red, and of no colour that a checksum knows
    turned = RGB.copy()
    turned[0, -1, 0] ^= 1
    yield Sound("BMP, a bit flipped", ".bmp", bytes(flipped), turned)
    least, long = RGB[:16, :16], np.tile(RGB[:16], (1, 5, 1))
    yield Sound("just large enough", ".png", encoded(least, "PNG"), least)
    yield Sound("just short enough", ".png", encoded(long, "PNG"), long)


def _palette() -> tuple[Image.Image, Array, Array]:
    """A picture of 16 colours; the colours [16, 3]; their numbers [H, W]."""
    chance = np.random.default_rng(1)
    colours, numbers = chance.integers(0, 256, (16, 3), dtype=np.uint8), chance.integers(0, 16, (H, W), dtype=np.uint8)
    image = Image.fromarray(numbers, "P")
    image.putpalette(colours.tobytes())
    return image, colours, numbers


def _stretched(samples: Array) -> Array:
    return gray((samples - samples.min().astype(float)) / np.ptp(samples.astype(float)) * 255)


def _ycbcr_to_rgb(samples: Array) -> Array:
    """By ITU-T T.871, in 0..255."""
    matrix = [[1, 0, 1.402], [1, -0.344136, -0.714136], [1, 1.772, 0]]
    return np.asarray(np.clip((samples - np.array([0, 128.0, 128.0])) @ np.transpose(matrix), 0, 255))


def _lab_to_rgb(lab: Array) -> Array:
    """CIELAB (D50; L as u8, a and b as i8) to sRGB in 0..255, white adapted by Bradford."""
    y = (lab[..., 0] * (100 / 255) + 16) / 116
    a, b = (lab[..., channel].astype(np.int8) for channel in (1, 2))
    roots = np.stack([y + a / 500, y, y - b / 200], -1)
    xyz = np.where(roots > 6 / 29, roots**3, 3 * (6 / 29) ** 2 * (roots - 4 / 29)) * (0.9642, 1, 0.8249)
    matrix = [[3.13386, -1.61687, -0.49061], [-0.97877, 1.91614, 0.03345], [0.07195, -0.22899, 1.40524]]
    linear = np.clip(xyz @ np.transpose(matrix), 0, 1)
    return np.asarray(255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055))
