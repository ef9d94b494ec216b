"""Cuts of an upright RGB image. Every function is pure: chance comes in as fractions in [0, 1)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from PIL import Image

from ip_adapter_trainer.core.values import Geometry, Size
from ip_adapter_trainer.images.background import Colour

if TYPE_CHECKING:
    from torch import Tensor

_REDUCING_GAP = 3.0  # box-average first down to 3 times the target: indistinguishable, and 3 to 5 times faster


def fit(image: Image.Image, target_px: Size, place: tuple[float, float] | None = None) -> tuple[Image.Image, Geometry]:
    """Resize an upright RGB image (Lanczos) until the target (height, width) is just covered, then crop the target out.

    The crop's place is from top to bottom and from left to right, each in [0, 1); None: centred.

    Returns:
        The crop, and how it was cut, as SDXL's micro-conditioning wants it (arXiv 2307.01952, section 2.2).
    """
    covered_px, geometry = plan((image.height, image.width), target_px, place)
    if covered_px != geometry.original_px:
        image = image.resize(covered_px[::-1], Image.Resampling.LANCZOS, reducing_gap=_REDUCING_GAP)
    (height, width), (top, left) = target_px, geometry.crop_px
    return image.crop((left, top, left + width, top + height)), geometry


def plan(original_px: Size, target_px: Size, place: tuple[float, float] | None = None) -> tuple[Size, Geometry]:
    """Return what `fit` does to an image of this size: the size that it is resized to, and the cut out of that."""
    height, width = target_px
    scale = max(height / original_px[0], width / original_px[1])
    covered_px = max(height, round(original_px[0] * scale)), max(width, round(original_px[1] * scale))
    return covered_px, Geometry(original_px, _corner(covered_px, target_px, place), target_px)


def _corner(whole_px: Size, part_px: Size, place: tuple[float, float] | None) -> tuple[int, int]:
    down, right = whole_px[0] - part_px[0], whole_px[1] - part_px[1]
    if place is None:
        return down // 2, right // 2
    return int(place[0] * (down + 1)), int(place[1] * (right + 1))


def to_tensor(image: Image.Image) -> Tensor:
    """Convert an RGB image to float32 [3, H, W]: black is -1, white is 1."""
    import numpy as np
    import torch

    pixels = torch.from_numpy(np.array(image, dtype=np.float32))  # [H, W, 3]
    return pixels.permute(2, 0, 1).contiguous().div_(127.5).sub_(1)


def random_part(image: Image.Image, min_share: float, draws: tuple[float, float, float]) -> Image.Image:
    """Return a part with the image's own aspect that keeps at least `min_share` of its area, in (0, 1].

    `draws` decides how much, how far down and how far right, each in [0, 1).
    """
    side_share = math.sqrt(min_share + (1 - min_share) * draws[0])
    part_px = math.ceil(image.height * side_share), math.ceil(image.width * side_share)
    top, left = _corner((image.height, image.width), part_px, draws[1:])
    return image.crop((left, top, left + part_px[1], top + part_px[0]))


def mirror(image: Image.Image) -> Image.Image:
    """Swap left and right."""
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def pad_to_square(image: Image.Image, colour: Colour) -> Image.Image:
    """Put the whole image into the middle of a square of its longer side."""
    side_px = max(image.size)
    square = Image.new("RGB", (side_px, side_px), colour)
    square.paste(image, ((side_px - image.width) // 2, (side_px - image.height) // 2))
    return square
