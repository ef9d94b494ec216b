"""From a path or bytes to an upright sRGB picture, or to a fault with a name.

The header is checked before a pixel is touched: format, file size, pixels, sides. So a small file that claims a
gigantic picture costs its header only.
"""

from __future__ import annotations

import io
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import BinaryIO, Literal, TypeVar

from PIL import Image, ImageFile, PngImagePlugin, UnidentifiedImageError

from ip_adapter_trainer.core.errors import Fault
from ip_adapter_trainer.core.values import Size
from ip_adapter_trainer.images.background import Colour
from ip_adapter_trainer.images.colour import NotFiniteSamplesError, fold_key, has_other_colours, to_rgb
from ip_adapter_trainer.images.formats import HEAD_BYTES, is_known, package_for, readable
from ip_adapter_trainer.images.limits import MOST_MEGAPIXELS, MOST_PROFILE_BYTES, Limits
from ip_adapter_trainer.storage.files import NotRegularError, open_regular

V = TypeVar("V")

_READABLE = readable()
FORMATS = tuple(_READABLE)
SUFFIXES = frozenset(chain(*_READABLE.values()))

FaultKind = Literal[
    "missing_file", "not_a_file", "unreadable", "empty_file", "file_too_large", "not_a_picture", "damaged", "truncated",
    "too_many_pixels", "too_small", "too_elongated", "not_finite",
    "unsafe_path",  # told by who looks the name up
    "changed", "not_listed",  # told by who knows what the file should be
    "not_prepared", "damaged_values",  # told by a prepared set
]  # fmt: skip

Note = Literal["several_frames", "profile_left_out", "not_srgb"]

_ORIENTATION_TAG, _TILE_WIDTH_TAG, _TILE_HEIGHT_TAG = 0x0112, 322, 323
_START_OF_SCAN, _MAX_SCANS = b"\xff\xda", 100  # usual are 1 to 12 of them, and a few more in thumbnails
_MAX_TILE_PIXELS = 2**20  # of pictures that are smaller than that
_EASY_PIXELS = 4_000_000  # which a file of any size may have
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
PngImagePlugin.MAX_TEXT_CHUNK = MOST_PROFILE_BYTES  # colour profiles are chunks too


class ImageFault(Exception):
    """The reason that a file gives no image: `kind` to count by, one line what, one line what to do."""

    def __init__(self, kind: FaultKind, what: str, remedy: str) -> None:
        super().__init__(kind, what, remedy)
        self.fault = Fault(kind, what, "", remedy)

    def __str__(self) -> str:
        return f"{self.fault.what}; {self.fault.remedy}"


@dataclass(frozen=True)
class DecodedImage:
    """A decoded picture: upright sRGB, and what is worth counting though no fault.

    Notes: `several_frames`, of which the first was taken; `profile_left_out`, a broken or unfitting colour profile;
    `not_srgb`, colours of another kind by what the file says otherwise than by a profile. These two are taken as sRGB.
    """

    image: Image.Image
    notes: tuple[Note, ...] = ()


def decode(source: Path | bytes, limits: Limits, background: Colour = (255, 255, 255)) -> DecodedImage:
    """Decode the first frame of an image to upright sRGB, with transparency laid on `background`.

    Raises:
        ImageFault: there is no such image.
    """
    with _opened(source, limits) as image:
        fold_key(image)
        _check_scans(image)
        others = _told(lambda: has_other_colours(image), False)
        image.load()
        turn = _orientation(image)  # after load: Pillow turns a TIFF itself, and then no longer says so
        rgb, left_out = to_rgb(image, background)
        frames = _told(lambda: bool(getattr(image, "is_animated", False)), False)
        noted: dict[Note, bool] = {"several_frames": frames, "profile_left_out": left_out, "not_srgb": others}
    upright = rgb.transpose(_TURNS[turn]) if turn in _TURNS else rgb
    return DecodedImage(upright, tuple(note for note, is_so in noted.items() if is_so))


def read_size(source: Path | bytes, limits: Limits) -> Size:
    """Return height and width of the upright image in pixels, from the header alone.

    Raises:
        ImageFault: there is no such image, as far as the header shows.
    """
    with _opened(source, limits) as image:
        width, height = image.size
        lies = image.format != "TIFF" and _orientation(image) in _LYING  # Pillow gives a TIFF's size upright
        return (width, height) if lies else (height, width)


def read_file(path: Path, limits: Limits) -> tuple[bytes, os.stat_result]:
    """Read an image file without decoding it; return its content and the status of the very file that was read.

    Raises:
        ImageFault: there is no such file, or it is over the limit.
    """
    with _stream(path, limits) as stream:
        try:
            return stream.read(), os.fstat(stream.fileno())
        except OSError as error:
            raise _fault_of(error, stream, limits) from error


@contextmanager
def _opened(source: Path | bytes, limits: Limits) -> Iterator[ImageFile.ImageFile]:
    """Give the picture with its header checked; whatever goes wrong inside the block becomes an `ImageFault`."""
    if Image.MAX_IMAGE_PIXELS is not None:  # which also holds for what is cropped later, and is never lowered
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, limits.max_pixels)
    with _stream(source, limits) as stream, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            size_bytes = stream.seek(0, os.SEEK_END)
            stream.seek(0)
            with Image.open(stream, formats=FORMATS) as image:
                check_size(image.size, limits)
                check_density(image.size, size_bytes, limits)
                _check_tiles(image)
                yield image
        except ImageFault:
            raise
        except Exception as error:  # a broken file can make Pillow raise nearly anything
            raise _fault_of(error, stream, limits) from error


def _stream(source: Path | bytes, limits: Limits) -> BinaryIO:
    if isinstance(source, bytes):
        stream: BinaryIO = io.BytesIO(source)
        size_bytes = len(source)
    else:
        stream = _open_file(source)
        size_bytes = os.fstat(stream.fileno()).st_size
    try:
        check_bytes(size_bytes, limits)
    except ImageFault:
        stream.close()
        raise
    return stream


def check_bytes(size_bytes: int, limits: Limits) -> None:
    """Demand that a file of this size is within the limits.

    Raises:
        ImageFault: it is not.
    """
    if size_bytes == 0:
        raise ImageFault("empty_file", "the file is empty", _REPLACE)
    if size_bytes > limits.max_file_bytes:
        megabytes = f"{size_bytes / 2**20:.1f} MB, over the limit of {limits.max_file_bytes / 2**20:g} MB"
        remedy = f"shrink it, or raise --max_image_mb to {math.ceil(size_bytes / 2**20)}"
        raise ImageFault("file_too_large", f"the file has {megabytes}", remedy)


def _open_file(path: Path) -> BinaryIO:
    try:
        return open_regular(path)
    except FileNotFoundError as error:
        raise ImageFault("missing_file", "there is no such file", "correct the path or --data_root_path") from error
    except NotRegularError as error:
        raise ImageFault("not_a_file", "the path is no regular file", "name a picture file") from error
    except (OSError, ValueError) as error:
        raise ImageFault("unreadable", f"the file cannot be read ({error})", "check its permissions") from error


def check_size(size_px: tuple[int, int], limits: Limits) -> None:
    """Demand that an image of this width and height in pixels is within the limits.

    Raises:
        ImageFault: it is not.
    """
    shorter, longer = sorted(size_px)
    what = f"{size_px[0]}x{size_px[1]} pixels"
    if shorter * longer > limits.max_pixels:
        raise _too_many_pixels(what, shorter * longer, limits)
    if shorter < limits.min_side_px:
        remedy = f"use a larger copy, or lower --min_side_px to {shorter}" if shorter else _REPLACE
        raise ImageFault("too_small", f"the picture is {what}, a side under {limits.min_side_px}", remedy)
    if longer > limits.max_aspect * shorter:
        remedy = f"crop it, or raise --max_aspect to {math.ceil(longer / shorter)}"
        raise ImageFault("too_elongated", f"the picture is {what}, more than {limits.max_aspect:g} to 1", remedy)


def check_density(size_px: tuple[int, int], size_bytes: int, limits: Limits) -> None:
    """Demand that a large image is no file of a few kilobytes, which could unpack to hundreds of megabytes.

    Raises:
        ImageFault: it is not.
    """
    width, height = size_px
    if width * height > max(_EASY_PIXELS, size_bytes * limits.max_pixels_per_byte):
        what = f"{width}x{height} pixels in {size_bytes:,} bytes, over the limit of "
        what += f"{limits.max_pixels_per_byte:g} to a byte"
        remedy = f"shrink it to {_EASY_PIXELS / 1e6:g} million pixels, or raise --max_pixels_per_byte to "
        remedy += str(math.ceil(width * height / size_bytes))
        raise ImageFault("too_many_pixels", f"the picture claims {what}", remedy)


def _check_tiles(image: ImageFile.ImageFile) -> None:
    """A tile of a TIFF is held whole, however small the picture is that lies in it."""
    tags = getattr(image, "tag_v2", {})
    width, height = tags.get(_TILE_WIDTH_TAG, 0), tags.get(_TILE_HEIGHT_TAG, 0)
    if width * height > max(_MAX_TILE_PIXELS, image.width * image.height):
        what = f"the picture claims tiles of {width}x{height} pixels for {image.width}x{image.height}"
        raise ImageFault("too_many_pixels", what, "save it again without tiles")


def _check_scans(image: ImageFile.ImageFile) -> None:
    """Each scan of a JPEG costs a pass over all its pixels, and a hundred bytes are enough for one."""
    if image.format not in ("JPEG", "MPO") or not image.fp:
        return
    image.fp.seek(0)
    scans = image.fp.read().count(_START_OF_SCAN)
    if scans > _MAX_SCANS:
        what = f"the picture is made up of {scans} scans, over the limit of {_MAX_SCANS}"
        raise ImageFault("damaged", what, "save it again as a baseline JPEG, or remove the row")


def _too_many_pixels(what: str, pixels: int, limits: Limits) -> ImageFault:
    megapixels = math.ceil(pixels / 1e6)
    remedy = f"shrink it, or raise --max_image_megapixels to {megapixels}"
    if megapixels > MOST_MEGAPIXELS:
        remedy = f"shrink it to {MOST_MEGAPIXELS:g} million pixels at most"
    over = f"over the limit of {limits.max_pixels / 1e6:g} million"
    return ImageFault("too_many_pixels", f"the picture claims {what}, {over}", remedy)


def _fault_of(error: Exception, stream: BinaryIO, limits: Limits) -> ImageFault:
    if isinstance(error, NotFiniteSamplesError):
        return ImageFault("not_finite", str(error), _REPLACE)
    if isinstance(error, Image.DecompressionBombWarning | Image.DecompressionBombError):
        pixels = int(re.findall(r"\d+", str(error))[0])  # Pillow raises it before it gives a size
        return _too_many_pixels(f"{pixels / 1e6:.1f} million pixels", pixels, limits)
    if isinstance(error, MemoryError):
        return ImageFault("too_many_pixels", "the picture takes more memory than there is", "shrink it")
    if isinstance(error, OSError) and error.errno is not None:
        return ImageFault("unreadable", f"the file cannot be read ({error.strerror})", "check the disk and retry")
    stream.seek(0)
    head = stream.read(HEAD_BYTES)
    if isinstance(error, UnidentifiedImageError) and (package := package_for(head, FORMATS)):
        remedy = f"install {package}, convert it to PNG or JPEG, or remove the row"
        return ImageFault("not_a_picture", "a picture of a format that cannot be read here", remedy)
    if isinstance(error, UnidentifiedImageError) and not is_known(head):
        what = f"not a picture of a known format ({', '.join(FORMATS)})"
        return ImageFault("not_a_picture", what, "convert it to PNG or JPEG, or remove the row")
    if isinstance(error, EOFError) or "truncated" in str(error).lower():
        return ImageFault("truncated", "the file ends before the picture does", _REPLACE)
    reason = "its header cannot be read" if isinstance(error, UnidentifiedImageError) else str(error).split("\n")[0]
    return ImageFault("damaged", f"the picture is damaged, cut short or of an unusual kind ({reason})", _REPLACE)


def _orientation(image: Image.Image) -> int:
    return _told(lambda: int(image.getexif().get(_ORIENTATION_TAG, 1)), 1)


def _told(ask: Callable[[], V], otherwise: V) -> V:
    """Return what a picture says beside its pixels; broken EXIF, colours or second frames say nothing."""
    try:
        return ask()
    except Exception:
        return otherwise
