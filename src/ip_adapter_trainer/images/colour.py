"""Any picture that Pillow decodes to 8-bit RGB: scaled by its depth, transparency laid on one ground.

How samples become 0..255, by Pillow's mode:

    I;16*   gray of 16 bits (12 in a TIFF that says so): white is the depth's largest value
    I       within 0..65535 it is 16-bit gray, which is how Pillow gives PGM; any other range is stretched
    F       within 0..1 white is 1; any other range is stretched, darkest to 0 and brightest to 255
    CMYK    Pillow's plain conversion; embedded colour profiles are not applied, in no mode
    others  8 bits already; 16-bit RGB keeps its upper byte
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile

from ip_adapter_trainer.images.ground import Colour

Samples = NDArray[Any]

_BITS_TAG, _PHOTOMETRIC_TAG, _WHITE_IS_ZERO = 258, 262, 0


class NotFiniteSamplesError(ValueError):
    """A float picture holds NaN or infinite samples."""


def to_rgb(image: Image.Image, ground: Colour) -> Image.Image:
    """A loaded picture of any mode as RGB.

    Raises:
        NotFiniteSamplesError: a float picture holds NaN or infinity.
    """
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        return _deep_to_rgb(image, ground)
    if not image.has_transparency_data:
        return image.convert("RGB")
    above = image if image.mode == "RGBA" else image.convert("RGBA")
    below = Image.new("RGB", image.size, ground)
    below.paste(above, mask=above)
    return below


def fold_key(image: ImageFile.ImageFile) -> None:
    """Brings the one transparent colour of a 16-bit RGB PNG to the upper bytes, which are all that loading keeps.

    Called before the picture is loaded, after which nothing tells its depth.
    """
    key = image.info.get("transparency")
    if isinstance(key, tuple) and any(args == "RGB;16B" for *_, args in image.tile):
        image.info["transparency"] = tuple(value >> 8 for value in key)


def _deep_to_rgb(image: Image.Image, ground: Colour) -> Image.Image:
    samples: Samples = np.asarray(image)  # [H, W]
    gray = Image.fromarray(_float_to_8_bits(samples) if image.mode == "F" else _integers_to_8_bits(image, samples))
    picture = gray.convert("RGB")
    key = image.info.get("transparency")  # PNG: the one gray value that is transparent
    if isinstance(key, int):
        picture.paste(ground, mask=Image.fromarray((samples == key).astype(np.uint8) * 255))
    return picture


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
