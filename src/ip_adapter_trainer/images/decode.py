"""From a path or bytes to an upright RGB picture, or to a fault with a name.

The header is checked before a pixel is touched: format, file size, pixels, sides. So a small file that claims a
gigantic picture costs its header only.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from PIL import Image, ImageFile, PngImagePlugin, UnidentifiedImageError

from ip_adapter_trainer.core.files import NotRegularError, open_regular
from ip_adapter_trainer.images.colour import NotFiniteSamplesError, fold_key, to_rgb
from ip_adapter_trainer.images.ground import Colour

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "AVIF")
SUFFIXES = frozenset(
    (
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".avif", ".bmp", ".tif", ".tiff", ".gif"),
        *(".ppm", ".pgm", ".pbm", ".pnm"),
    )
)

FaultKind = Literal[
    "missing_file", "not_a_file", "unreadable", "empty_file", "file_too_large", "not_a_picture", "damaged", "truncated",
    "too_many_pixels", "too_small", "too_elongated", "not_finite",
    "unsafe_path",  # told by who looks the name up
    "changed", "not_listed",  # told by who knows what the file should be
    "not_prepared", "damaged_values",  # told by a prepared set
]  # fmt: skip

Note = Literal["several_frames"]

_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG", b"RIFF", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_ORIENTATION_TAG, _TILE_WIDTH_TAG, _TILE_HEIGHT_TAG = 0x0112, 322, 323
_START_OF_SCAN, _MAX_SCANS = b"\xff\xda", 100  # usual are 1 to 12 of them, and a few more in thumbnails
_MAX_TILE_PIXELS = 2**20  # of pictures that are smaller than that
_EASY_PIXELS, _MAX_PIXELS_PER_BYTE = 4_000_000, 250  # photographs have 1 to 40 pixels a byte, drawings some more
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_LYING = (5, 6, 7, 8)  # width and height change places
_REPLACE = "replace the file by a sound copy, or remove the row"

# Compressed text chunks are unpacked while the header is read; Pillow's own limit of 64 MiB is a bomb's worth.
PngImagePlugin.MAX_TEXT_MEMORY = min(PngImagePlugin.MAX_TEXT_MEMORY, 8 * 2**20)


class PictureFault(Exception):
    """Why a file gives no picture: `kind` to count by, one line what, one line what to do."""

    def __init__(self, kind: FaultKind, what: str, remedy: str) -> None:
        super().__init__(kind, what, remedy)
        self.kind, self.what, self.remedy = kind, what, remedy

    def __str__(self) -> str:
        return f"{self.what}; {self.remedy}"


@dataclass(frozen=True)
class Limits:
    """What a picture may be; the defaults bound the memory of decoding one picture at about 1 GB."""

    max_pixels: int = 64_000_000
    max_file_bytes: int = 128 * 2**20
    min_side_px: int = 16
    max_aspect: float = 10.0  # longer side over shorter side


@dataclass(frozen=True)
class Picture:
    """A decoded picture: RGB, upright, and what is worth counting though no fault."""

    image: Image.Image
    notes: tuple[Note, ...] = ()


def decode(source: Path | bytes, limits: Limits, ground: Colour = (255, 255, 255)) -> Picture:
    """The first frame of a picture as upright RGB, transparency laid on `ground`.

    Raises:
        PictureFault: no such picture.
    """
    with _opened(source, limits) as image:
        fold_key(image)
        _check_scans(image)
        image.load()
        turn = _orientation(image)  # after load: Pillow turns a TIFF itself, and then no longer says so
        picture = to_rgb(image, ground)
        notes: tuple[Note, ...] = ("several_frames",) if _has_several_frames(image) else ()
    return Picture(picture.transpose(_TURNS[turn]) if turn in _TURNS else picture, notes)


def read_size(source: Path | bytes, limits: Limits) -> tuple[int, int]:
    """Height and width of the upright picture in pixels, from the header alone.

    Raises:
        PictureFault: no such picture, as far as the header tells.
    """
    with _opened(source, limits) as image:
        width, height = image.size
        lies = image.format != "TIFF" and _orientation(image) in _LYING  # Pillow gives a TIFF's size upright
        return (width, height) if lies else (height, width)


def read_file(path: Path, limits: Limits) -> tuple[bytes, os.stat_result]:
    """A picture file's content, undecoded, and what the system says of the very file that was read.

    Raises:
        PictureFault: no such file, or one over the limit.
    """
    with _stream(path, limits) as stream:
        try:
            return stream.read(), os.fstat(stream.fileno())
        except OSError as error:
            raise _fault_of(error, stream) from error


@contextmanager
def _opened(source: Path | bytes, limits: Limits) -> Iterator[ImageFile.ImageFile]:
    """The picture with its header checked; whatever goes wrong inside the block becomes a `PictureFault`."""
    with _stream(source, limits) as stream, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            size_bytes = stream.seek(0, os.SEEK_END)
            stream.seek(0)
            with Image.open(stream, formats=FORMATS) as image:
                check_size(image.size, limits)
                _check_density(image.size, size_bytes)
                _check_tiles(image)
                yield image
        except PictureFault:
            raise
        except Exception as error:  # a broken file can make Pillow raise nearly anything
            raise _fault_of(error, stream) from error


def _stream(source: Path | bytes, limits: Limits) -> BinaryIO:
    if isinstance(source, bytes):
        stream: BinaryIO = io.BytesIO(source)
        size_bytes = len(source)
    else:
        stream = _open_file(source)
        size_bytes = os.fstat(stream.fileno()).st_size
    try:
        check_bytes(size_bytes, limits)
    except PictureFault:
        stream.close()
        raise
    return stream


def check_bytes(size_bytes: int, limits: Limits) -> None:
    """Demands that a file of this size is within the limits.

    Raises:
        PictureFault: it is not.
    """
    if size_bytes == 0:
        raise PictureFault("empty_file", "the file is empty", _REPLACE)
    if size_bytes > limits.max_file_bytes:
        megabytes = f"{size_bytes / 2**20:.1f} MB, over the limit of {limits.max_file_bytes / 2**20:g} MB"
        raise PictureFault("file_too_large", f"the file has {megabytes}", "shrink it, or raise --max_picture_mb")


def _open_file(path: Path) -> BinaryIO:
    try:
        return open_regular(path)
    except FileNotFoundError as error:
        raise PictureFault("missing_file", "there is no such file", "correct the path or --data_root_path") from error
    except NotRegularError as error:
        raise PictureFault("not_a_file", "the path is no regular file", "name a picture file") from error
    except (OSError, ValueError) as error:
        raise PictureFault("unreadable", f"the file cannot be read ({error})", "check its permissions") from error


def check_size(size_px: tuple[int, int], limits: Limits) -> None:
    """Demands that a picture of this width and height in pixels is within the limits.

    Raises:
        PictureFault: it is not.
    """
    width, height = size_px
    if width * height > limits.max_pixels:
        raise _too_many_pixels(f"{width}x{height} pixels, over the limit of {limits.max_pixels / 1e6:g} million")
    if min(size_px) < limits.min_side_px:
        what = f"the picture is {width}x{height} pixels, a side under {limits.min_side_px}"
        raise PictureFault("too_small", what, "use a larger copy, or lower --min_side_px")
    if max(size_px) > limits.max_aspect * min(size_px):
        what = f"the picture is {width}x{height} pixels, more than {limits.max_aspect:g} to 1"
        raise PictureFault("too_elongated", what, "crop it, or raise --max_aspect")


def _check_tiles(image: ImageFile.ImageFile) -> None:
    """A tile of a TIFF is held whole, however small the picture is that lies in it."""
    tags = getattr(image, "tag_v2", {})
    width, height = tags.get(_TILE_WIDTH_TAG, 0), tags.get(_TILE_HEIGHT_TAG, 0)
    if width * height > max(_MAX_TILE_PIXELS, image.width * image.height):
        raise _too_many_pixels(f"tiles of {width}x{height} pixels for {image.width}x{image.height}")


def _check_density(size_px: tuple[int, int], size_bytes: int) -> None:
    """A few kilobytes unpack to hundreds of megabytes where a picture is all of one colour."""
    width, height = size_px
    if width * height > max(_EASY_PIXELS, size_bytes * _MAX_PIXELS_PER_BYTE):
        what = f"{width}x{height} pixels in {size_bytes:,} bytes, over the limit of {_MAX_PIXELS_PER_BYTE} to a byte"
        remedy = f"shrink it to {_EASY_PIXELS / 1e6:g} million pixels"
        raise PictureFault("too_many_pixels", f"the picture claims {what}", remedy)


def _check_scans(image: ImageFile.ImageFile) -> None:
    """Each scan of a JPEG costs a pass over all its pixels, and a hundred bytes are enough for one."""
    if image.format not in ("JPEG", "MPO") or not image.fp:
        return
    image.fp.seek(0)
    scans = image.fp.read().count(_START_OF_SCAN)
    if scans > _MAX_SCANS:
        raise PictureFault(
            "damaged", f"the picture is made up of {scans} scans, over the limit of {_MAX_SCANS}", _REPLACE
        )


def _too_many_pixels(what: str) -> PictureFault:
    return PictureFault("too_many_pixels", f"the picture claims {what}", "shrink it, or raise --max_picture_megapixels")


def _fault_of(error: Exception, stream: BinaryIO) -> PictureFault:
    if isinstance(error, NotFiniteSamplesError):
        return PictureFault("not_finite", str(error), _REPLACE)
    if isinstance(error, Image.DecompressionBombWarning | Image.DecompressionBombError | MemoryError):
        return _too_many_pixels("more pixels than can be decoded safely")
    if isinstance(error, OSError) and error.errno is not None:
        return PictureFault("unreadable", f"the file cannot be read ({error.strerror})", "check the disk and retry")
    if isinstance(error, UnidentifiedImageError) and not _has_known_signature(stream):
        what = f"not a picture of a known format ({', '.join(FORMATS)})"
        return PictureFault("not_a_picture", what, "convert it to PNG or JPEG, or remove the row")
    if isinstance(error, EOFError) or "truncated" in str(error).lower():
        return PictureFault("truncated", "the file ends before the picture does", _REPLACE)
    reason = "its header cannot be read" if isinstance(error, UnidentifiedImageError) else str(error).split("\n")[0]
    return PictureFault("damaged", f"the picture is damaged, cut short or of an unusual kind ({reason})", _REPLACE)


def _has_known_signature(stream: BinaryIO) -> bool:
    stream.seek(0)
    return stream.read(8).startswith(_SIGNATURES)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # broken EXIF says nothing; the pixels may still be sound
        return 1


def _has_several_frames(image: Image.Image) -> bool:
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception:  # a broken second frame; the first has been read
        return False
