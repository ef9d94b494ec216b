"""Any picture that Pillow decodes to 8-bit sRGB: scaled by its depth, transparency laid on one ground.

How samples become 0..255, by Pillow's mode:

    I;16*   gray of 16 bits (12 in a TIFF that says so): white is the depth's largest value
    I       within 0..65535 it is 16-bit gray, which is how Pillow gives PGM; any other range is stretched
    F       within 0..1 white is 1; any other range is stretched, darkest to 0 and brightest to 255
    CMYK    by its colour profile; Pillow's plain conversion if it has none
    others  8 bits already; 16-bit RGB keeps its upper byte

An embedded colour profile is applied to the 8 bits (see `images.profiles`). What else a file says of its colours is
only noted: gAMA, cHRM and cICP of PNG, the interoperability index of EXIF, the nclx box of AVIF and HEIF.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile

from ip_adapter_trainer.images.background import Colour
from ip_adapter_trainer.images.profiles import to_srgb

Samples = NDArray[Any]

_BITS_TAG, _PHOTOMETRIC_TAG, _WHITE_IS_ZERO = 258, 262, 0
_SRGB_GAMMA, _SRGB_CHROMATICITIES = 1 / 2.2, (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)  # as PNG gives them
_NEAR = 0.02
_CODES = {"PNG": (b"cICP", ">BB"), "AVIF": (b"colrnclx", ">HH"), "HEIF": (b"colrnclx", ">HH")}  # of ITU-T H.273
_CODES_WITHIN = 2**16  # bytes of the file
_PLAIN_PRIMARIES, _PLAIN_CURVES = (1, 2), (1, 2, 4, 6, 13, 14, 15)  # as good as sRGB, or not told


class NotFiniteSamplesError(ValueError):
    """A float picture holds NaN or infinite samples."""


def to_rgb(image: Image.Image, background: Colour) -> tuple[Image.Image, bool]:
    """Convert a loaded picture of any mode to sRGB.

    Returns:
        The picture in RGB, and whether it has a colour profile that was left out.

    Raises:
        NotFiniteSamplesError: a float picture holds NaN or infinity.
    """
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        return _deep_to_rgb(image, background, profile)
    if not image.has_transparency_data:
        return to_srgb(image, "RGB", profile)
    above, left_out = to_srgb(image, "RGBA", profile)
    below = Image.new("RGB", image.size, background)
    below.paste(above, mask=above)
    return below, left_out


def fold_key(image: ImageFile.ImageFile) -> None:
    """Move the one transparent colour of a 16-bit RGB PNG to the upper bytes, which are all that loading keeps.

    Call it before the image is loaded, after which nothing shows its depth.
    """
    key = image.info.get("transparency")
    if isinstance(key, tuple) and any(args == "RGB;16B" for *_, args in image.tile):
        image.info["transparency"] = tuple(value >> 8 for value in key)


def has_other_colours(image: ImageFile.ImageFile) -> bool:
    """Return whether a picture says otherwise than by a profile that its colours are not those of sRGB.

    Called before the picture is loaded, as long as the file can be read.
    """
    info = image.info
    if info.get("icc_profile"):
        return False
    if image.format in ("JPEG", "MPO"):
        return image.getexif().get_ifd(ExifTags.IFD.Interop).get(1) == "R03"  # Adobe RGB, by DCF 2.0
    if image.format == "PNG" and "srgb" not in info:
        points = zip(info.get("chromaticity", ()), _SRGB_CHROMATICITIES, strict=False)
        apart = [abs(own - srgb) for own, srgb in ((info.get("gamma", _SRGB_GAMMA), _SRGB_GAMMA), *points)]
        return max(apart) > _NEAR or _has_other_codes(image)
    return _has_other_codes(image)


def _has_other_codes(image: ImageFile.ImageFile) -> bool:
    if image.format not in _CODES or image.fp is None:
        return False
    marker, layout = _CODES[image.format]
    place = image.fp.tell()
    image.fp.seek(0)
    _, _, after = image.fp.read(_CODES_WITHIN).partition(marker)
    image.fp.seek(place)
    if len(after) < struct.calcsize(layout):
        return False
    primaries, curve = struct.unpack_from(layout, after)
    return primaries not in _PLAIN_PRIMARIES or curve not in _PLAIN_CURVES


def _deep_to_rgb(image: Image.Image, background: Colour, profile: object) -> tuple[Image.Image, bool]:
    samples: Samples = np.asarray(image)  # [H, W]
    gray = Image.fromarray(_float_to_8_bits(samples) if image.mode == "F" else _integers_to_8_bits(image, samples))
    rgb, left_out = to_srgb(gray, "RGB", profile)
    key = image.info.get("transparency")  # PNG: the one gray value that is transparent
    if isinstance(key, int):
        rgb.paste(background, mask=Image.fromarray((samples == key).astype(np.uint8) * 255))
    return rgb, left_out


def _integers_to_8_bits(image: Image.Image, samples: Samples) -> NDArray[np.uint8]:
    tags = getattr(image, "tag_v2", {}) if image.mode != "I" else {}  # of a TIFF
    white = 2 ** tags.get(_BITS_TAG, (16,))[0] - 1
    if samples.min() < 0 or samples.max() > white:
        return _stretch(samples)
    table = np.rint(np.arange(white + 1) * (255 / white)).astype(np.uint8)
    if tags.get(_PHOTOMETRIC_TAG) == _WHITE_IS_ZERO:
        table = table[::-1]
    return np.take(table, samples)


def _float_to_8_bits(samples: Samples) -> NDArray[np.uint8]:
    if not np.isfinite(samples).all():
        raise NotFiniteSamplesError("the picture holds NaN or infinite samples")
    if samples.min() < 0 or samples.max() > 1:
        return _stretch(samples)
    levels: NDArray[np.uint8] = np.rint(samples * 255).astype(np.uint8)
    return levels


def _stretch(samples: Samples) -> NDArray[np.uint8]:
    """Darkest to 0, brightest to 255; a picture of one value becomes middle gray."""
    low, high = float(samples.min()), float(samples.max())
    if low == high:
        return np.full(samples.shape, 128, np.uint8)
    levels = samples.astype(np.float64)  # in place from here on: large pictures are why
    levels -= low
    levels *= 255 / (high - low)
    return np.rint(levels, out=levels).astype(np.uint8)
