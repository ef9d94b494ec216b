"""What every kind of file becomes: the right pixels, or a fault with a name."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from PIL import Image

from ip_adapter_trainer.images.decode import FaultKind, Limits, PictureFault, decode, read_size
from tests.images.files import Array, chunk, encoded, gray, over, png, png_claiming, tiff_gray

LIMITS = Limits(min_side_px=1)
GROUND = (10, 200, 90)
H, W = 24, 32
RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (H, W, 3), dtype=np.uint8)
ALPHA = RNG.integers(0, 256, (H, W), dtype=np.uint8)
GRAY = RGB[..., 0]
DEEP = RNG.integers(0, 65536, (H, W), dtype=np.uint16)
UNIT = RNG.random((H, W), dtype=np.float32)
SIGNED = RNG.integers(-5_000_000, 9_000_000, (H, W), dtype=np.int32)
CMYK = RNG.integers(0, 256, (H, W, 4), dtype=np.uint8)
TWELVE = RNG.integers(0, 4096, (H, W), dtype=np.uint16)


def _packed_12_bits(samples: Array) -> bytes:
    first, second = samples[:, ::2], samples[:, 1::2]
    return np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], axis=-1).astype(np.uint8).tobytes()


def _stretched(samples: Array) -> Array:
    return gray((samples - samples.min().astype(float)) / np.ptp(samples.astype(float)) * 255)


def _palette() -> tuple[Image.Image, Array]:
    colours, opacity = RNG.integers(0, 256, (16, 3), dtype=np.uint8), RNG.integers(0, 256, 16, dtype=np.uint8)
    numbers = RNG.integers(0, 16, (H, W), dtype=np.uint8)
    image = Image.fromarray(numbers, "P")
    image.putpalette(colours.tobytes())
    image.info["transparency"] = opacity.tobytes()
    return image, over(colours[numbers], opacity[numbers], GROUND)


def _cases() -> dict[str, tuple[bytes, Array]]:
    """A file and its picture in 0..255, by numpy alone."""
    palette, palette_rgb = _palette()
    bits = GRAY > 127
    key = int(DEEP[3, 4])
    deep_rgb = RNG.integers(0, 65536, (H, W, 3), dtype=np.uint16)
    deep_rgba = RNG.integers(0, 65536, (H, W, 4), dtype=np.uint16)
    keyed = np.where((key == DEEP)[..., None], GROUND, gray(DEEP / 257))
    return {
        "rgb png": (encoded(RGB, "PNG"), RGB),
        "rgb bmp": (encoded(RGB, "BMP"), RGB),
        "rgb tiff": (encoded(RGB, "TIFF", compression="tiff_lzw"), RGB),
        "rgb ppm": (encoded(RGB, "PPM"), RGB),
        "rgb webp": (encoded(RGB, "WEBP", lossless=True), RGB),
        "gray": (encoded(GRAY, "PNG"), gray(GRAY)),
        "one bit": (encoded(Image.fromarray(bits), "PNG"), gray(bits * 255)),
        "rgba png": (encoded(np.dstack([RGB, ALPHA]), "PNG"), over(RGB, ALPHA, GROUND)),
        "rgba webp": (encoded(np.dstack([RGB, ALPHA]), "WEBP", lossless=True, exact=True), over(RGB, ALPHA, GROUND)),
        "gray and alpha": (encoded(np.dstack([GRAY, ALPHA]), "PNG"), over(gray(GRAY), ALPHA, GROUND)),
        "palette with transparency": (encoded(palette, "PNG", transparency=palette.info["transparency"]), palette_rgb),
        "cmyk": (encoded(Image.fromarray(CMYK, "CMYK"), "TIFF"), (255 - CMYK[..., :3]) * ((255 - CMYK[..., 3:]) / 255)),
        "16-bit gray png": (encoded(DEEP, "PNG"), gray(DEEP / 257)),
        "16-bit gray tiff": (encoded(DEEP, "TIFF"), gray(DEEP / 257)),
        "16-bit gray pgm": (encoded(DEEP, "PPM"), gray(DEEP / 257)),
        "16-bit gray with a transparent value": (png(DEEP, 0, extra=chunk(b"tRNS", key.to_bytes(2, "big"))), keyed),
        "16-bit rgb": (png(deep_rgb, 2), deep_rgb / 257),
        # Pillow keeps the upper byte of each: under 1 off for colour alone, under 2 for colour and alpha together.
        "16-bit rgba": (png(deep_rgba, 6), over(deep_rgba[..., :3] >> 8, deep_rgba[..., 3] >> 8, GROUND)),
        "16-bit tiff, white is zero": (
            tiff_gray(DEEP.astype("<u2").tobytes(), W, H, bits=16, photometric=0), gray(255 - DEEP / 257)
        ),
        "12-bit tiff": (tiff_gray(_packed_12_bits(TWELVE), W, H, bits=12), gray(TWELVE / 4095 * 255)),
        "float tiff in 0..1": (encoded(UNIT, "TIFF"), gray(UNIT * 255)),
        "float tiff beyond": (encoded(UNIT * 9 - 3, "TIFF"), _stretched(UNIT)),
        "32-bit tiff": (encoded(SIGNED, "TIFF"), _stretched(SIGNED)),
    }  # fmt: skip


CASES = _cases()


@pytest.mark.parametrize("name", CASES)
def test_pixels_are_those_of_the_reference(name: str) -> None:
    data, expected = CASES[name]
    picture = decode(data, LIMITS, GROUND)
    assert picture.image.mode == "RGB" and not picture.notes
    assert np.abs(np.asarray(picture.image, dtype=float) - expected).max() <= 1


def test_jpegs_of_every_kind_are_near_the_reference() -> None:
    smooth = np.linspace(0, 255, H * W * 3).reshape(H, W, 3).astype(np.uint8)
    ink = np.dstack([255 - smooth, np.zeros((H, W), np.uint8)])
    for data in (
        encoded(smooth, "JPEG", quality=100, subsampling=0),
        encoded(Image.fromarray(ink, "CMYK"), "JPEG", quality=100, subsampling=0),
        encoded(smooth, "JPEG", quality=100, subsampling=0, progressive=True),
    ):
        assert np.abs(np.asarray(decode(data, LIMITS).image, dtype=int) - smooth).max() <= 6


def test_a_picture_of_one_value_beyond_its_depth_is_gray() -> None:
    picture = decode(encoded(np.full((H, W), 7.5, np.float32), "TIFF"), LIMITS).image
    assert picture.getcolors() == [(H * W, (128, 128, 128))]


# By the EXIF standard: what the stored picture must undergo to stand upright.
UPRIGHT: dict[int, Callable[[Array], Array]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize(("format", "options"), [("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True}), ("JPEG", {})])
def test_exif_orientation_is_applied_once(format: str, options: dict[str, bool], orientation: int) -> None:
    blocks = np.kron(RNG.integers(0, 2, (3, 4, 1), dtype=np.uint8) * 255, np.ones((8, 8, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(blocks, format, exif=exif, **options)
    upright = UPRIGHT[orientation](blocks)
    assert np.abs(np.asarray(decode(data, LIMITS).image, dtype=int) - upright).max() <= (30 if format == "JPEG" else 0)
    assert read_size(data, LIMITS) == upright.shape[:2]


def test_broken_exif_leaves_the_picture_as_stored() -> None:
    data = encoded(RGB, "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff nonsense")
    assert (np.asarray(decode(data, LIMITS).image) == RGB).all()
    assert read_size(data, LIMITS) == (H, W)


@pytest.mark.parametrize("format", ["GIF", "TIFF", "WEBP", "PNG"])
def test_the_first_frame_counts_and_more_are_noted(format: str) -> None:
    frames = [Image.new("RGB", (W, H), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
    picture = decode(data, LIMITS)
    assert picture.notes == ("several_frames",)
    assert picture.image.getcolors() == [(H * W, (255, 0, 0))]


def _fault(source: Path | bytes, limits: Limits = LIMITS) -> str:
    with pytest.raises(PictureFault) as caught:
        decode(source, limits)
    assert caught.value.what and caught.value.remedy and "\n" not in str(caught.value)
    return caught.value.kind


def _as_file(folder: Path, data: bytes) -> Path:
    path = folder / "picture"
    path.write_bytes(data)
    return path


def _scratched(data: bytes) -> bytes:
    return data[:500] + bytes(byte ^ 1 for byte in data[500:510]) + data[510:]


def _unfinished(samples: Array) -> bytes:
    return encoded(samples, "JPEG")[:-200]


FAULTY: dict[str, Callable[[Path], Path | bytes]] = {
    "missing_file": lambda folder: folder / "none.png",
    "not_a_file": lambda folder: folder,
    "unreadable": lambda folder: folder / ("n" * 300),
    "empty_file": lambda folder: _as_file(folder, b""),
    "file_too_large": lambda folder: _as_file(folder, bytes(LIMITS.max_file_bytes + 1)),
    "not_a_picture": lambda folder: _as_file(folder, b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
    "damaged": lambda folder: _as_file(folder, _scratched(encoded(RGB, "PNG"))),
    "truncated": lambda folder: _as_file(folder, _unfinished(RGB)),
    "too_many_pixels": lambda folder: _as_file(folder, png_claiming(9000, 9000, b"")),
    "too_small": lambda folder: _as_file(folder, encoded(RGB[:8], "PNG")),
    "too_elongated": lambda folder: _as_file(folder, encoded(np.zeros((20, 220), np.uint8), "PNG")),
    "not_finite": lambda folder: _as_file(folder, encoded(np.where(UNIT > 0.5, np.nan, UNIT), "TIFF")),
}


@pytest.mark.parametrize("kind", FAULTY)
def test_each_fault_has_its_name(kind: str, tmp_path: Path) -> None:
    assert _fault(FAULTY[kind](tmp_path), Limits()) == kind


def test_every_kind_is_tested() -> None:
    assert set(get_args(FaultKind)) == set(FAULTY) | {"unsafe_path", "changed", "not_prepared", "damaged_values"}


def test_formats_off_the_list_are_refused() -> None:
    for format in ("ICO", "TGA", "JPEG2000", "PCX"):
        assert _fault(encoded(RGB, format)) == "not_a_picture"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_pipes_and_devices_are_neither_read_nor_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    assert _fault(tmp_path / "pipe.png") == "not_a_file"
    assert _fault(Path("/dev/zero")) == "not_a_file"


STORED = {
    "JPEG": encoded(RGB, "JPEG"), "PNG": encoded(RGB, "PNG"), "GIF": encoded(GRAY, "GIF"), "BMP": encoded(RGB, "BMP"),
    "WEBP": encoded(RGB, "WEBP", lossless=True), "TIFF": encoded(RGB, "TIFF", compression="tiff_deflate"),
    "PPM": encoded(RGB, "PPM"), "palette": CASES["palette with transparency"][0], "float": encoded(UNIT, "TIFF"),
}  # fmt: skip


@pytest.mark.parametrize("format", STORED)
def test_a_file_cut_anywhere_is_a_fault_unless_all_its_pixels_are_there(format: str) -> None:
    data = STORED[format]
    whole = decode(data, LIMITS).image.tobytes()
    for end in {*range(1, len(data), max(1, len(data) // 60)), *range(len(data) - 25, len(data))}:
        try:
            assert decode(data[:end], LIMITS).image.tobytes() == whole, end
        except PictureFault as fault:
            assert fault.kind in ("truncated", "damaged", "not_a_picture", "too_small"), end


@pytest.mark.parametrize("format", STORED)
def test_noise_in_a_file_is_a_picture_or_a_fault_and_never_a_word_more(format: str) -> None:
    chance = random.Random(format)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(80):
            data = bytearray(STORED[format])
            for _ in range(chance.randint(1, 6)):
                data[chance.randrange(min(len(data), 400))] = chance.randrange(256)
            try:
                decode(bytes(data), LIMITS)
            except PictureFault as fault:
                assert fault.kind in get_args(FaultKind)


def _claiming_webp(side_px: int) -> bytes:
    frames = [Image.new("RGBA", (32, 32), colour) for colour in ("red", "lime")]
    data = bytearray(encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True))
    canvas = data.index(b"VP8X") + 12
    data[canvas : canvas + 6] = (side_px - 1).to_bytes(3, "little") * 2
    return bytes(data)


BOMBS = {
    "webp canvas": _claiming_webp(16_000),
    "png pixels": png_claiming(20_000, 20_000, zlib.compress(bytes(20_000 * 60_001 // 40), 9)),
    "png text": png_claiming(
        32, 32, b"", extra=b"".join(chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(2**20 - 1))) for _ in range(60))
    ),
    "gif screen": b"GIF89a\xff\xff\xff\xff\x80\x00\x00" + bytes(6) + b",\0\0\0\0\xff\xff\xff\xff\0\x08\x02\x4c\x01\0;",
    "tiff": tiff_gray(bytes(64), 60_000, 60_000, bits=8),
}
MEASURE = """
import resource, sys
from ip_adapter_trainer.images.decode import Limits, PictureFault, decode
def peak_mb(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)
data = sys.stdin.buffer.read()
from PIL import Image; Image.init()
base = peak_mb()
try: decode(data, Limits())
except PictureFault as fault: print(fault.kind, peak_mb() - base)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no resource module")
@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_costs_its_header_only(bomb: str) -> None:
    result = subprocess.run([sys.executable, "-c", MEASURE], input=BOMBS[bomb], capture_output=True, check=True)
    kind, megabytes = result.stdout.decode().split()
    assert kind in ("too_many_pixels", "damaged") and float(megabytes) < 50
