"""Embedded ICC colour profiles: a picture's own colours brought to sRGB, by littlecms, which comes with Pillow.

Relative colorimetric with black point compensation, as picture editors do it. A profile is left out, and the picture
taken as sRGB, if it is broken, too large or for other colours than the picture has: a gray one fits gray pictures, one
of inks CMYK, and one of RGB all others and gray ones too, which are RGB of equal parts.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

from ip_adapter_trainer.images.limits import MOST_PROFILE_BYTES

Conversion = Callable[[Image.Image], Image.Image]

_CLASSES = (b"mntr", b"scnr", b"prtr", b"spac")  # those of devices and spaces; others link two or name single colours
_GRAY, _NOT_RGB = ("1", "L", "LA"), ("CMYK", "LAB")
_PRECISE = ImageCms.Flags.BLACKPOINTCOMPENSATION | ImageCms.Flags.NOOPTIMIZE  # and slow
_FAST = ImageCms.Flags.BLACKPOINTCOMPENSATION | ImageCms.Flags.HIGHRESPRECALC
_ROUNDING = 1  # a profile that moves no value by more is sRGB's own, of which there are many editions
_KEPT = 16  # conversions, of which one takes up to 3 MB beside its profile


def to_srgb(image: Image.Image, mode: str, profile: object) -> tuple[Image.Image, bool]:
    """Convert a picture of 8 bits, which may be changed, to sRGB by the profile that Pillow found in it, or None.

    Returns:
        The picture in `mode`, RGB or RGBA, and whether it has a profile that was left out.
    """
    space = _space(profile)
    if profile is None or (space, image.mode) == (b"Lab ", "LAB"):
        return _spread(image, mode), False
    fits = {b"RGB ": image.mode not in _NOT_RGB, b"GRAY": image.mode in _GRAY, b"CMYK": image.mode == "CMYK"}
    conversion = _conversion(profile, mode) if fits.get(space) else None
    if conversion is None:
        return _spread(image, mode), True
    return conversion(image if space == b"CMYK" else _spread(image, mode)), False


def _spread(image: Image.Image, mode: str) -> Image.Image:
    return image if image.mode == mode else image.convert(mode)


def _space(profile: object) -> bytes:
    """The colours that a profile is for, by its header; nothing if it cannot be used."""
    usable = isinstance(profile, bytes) and len(profile) <= MOST_PROFILE_BYTES and profile[12:16] in _CLASSES
    return profile[16:20] if usable and isinstance(profile, bytes) else b""


@lru_cache(maxsize=_KEPT)
def _conversion(profile: Any, mode: str) -> Conversion | None:
    """Make the conversion of a picture's colours, spread out to RGB or RGBA if no inks, to sRGB; None: broken."""
    try:
        space = _space(profile)
        if space == b"CMYK":
            return _transform(profile, "CMYK", mode, _FAST).apply
        return _of_gray(profile, mode) if space == b"GRAY" else _of_rgb(profile, mode)
    except Exception:  # Pillow raises this and that when littlecms refuses a profile
        return None


def _of_gray(profile: bytes, mode: str) -> Conversion:
    ramp = np.arange(256, dtype=np.uint8)
    levels = _transform(profile, "L", "RGB", _PRECISE).apply(Image.fromarray(ramp[None]))
    table: NDArray[np.uint8] = np.asarray(levels)[0].T  # [3, 256]
    if _is_same(table, ramp):
        return lambda image: image
    opacity = ramp[None, :] if mode == "RGBA" else ramp[:0]
    return lambda image: image.point([*table.ravel().tolist(), *opacity.ravel().tolist()])


def _of_rgb(profile: bytes, mode: str) -> Conversion:
    transform = _transform(profile, mode, mode, _FAST)
    steps = np.arange(0, 256, 17, dtype=np.uint8)
    cube = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(64, 64, 3)
    turned = transform.apply(Image.fromarray(cube).convert(mode)).convert("RGB")
    return (lambda image: image) if _is_same(np.asarray(turned), cube) else transform.apply_in_place


def _is_same(turned: NDArray[np.uint8], samples: NDArray[np.uint8]) -> bool:
    return bool(np.abs(turned.astype(int) - samples).max() <= _ROUNDING)


def _transform(profile: bytes, mode: str, into: str, flags: ImageCms.Flags) -> ImageCms.ImageCmsTransform:
    own, srgb = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    return ImageCms.ImageCmsTransform(own, srgb, mode, into, ImageCms.Intent.RELATIVE_COLORIMETRIC, flags=flags)
