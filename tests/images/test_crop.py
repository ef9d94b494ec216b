"""Cuts cover, centre, and keep what they promise; their geometry says what was done."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ip_adapter_trainer.images import crop

FRACTIONS = st.floats(0, 1, exclude_max=True)
SIDES = st.integers(16, 160)


def _ramp(height: int, width: int) -> Image.Image:
    """Red grows downwards, green to the right."""
    down, right = np.meshgrid(np.linspace(0, 255, height), np.linspace(0, 255, width), indexing="ij")
    return Image.fromarray(np.stack([down, right, np.zeros_like(down)], axis=2).astype(np.uint8))


@settings(max_examples=60, deadline=None)
@given(SIDES, SIDES, SIDES, SIDES, st.none() | st.tuples(FRACTIONS, FRACTIONS))
def test_fit_gives_the_target_from_inside_the_resized_picture(
    height: int, width: int, rows: int, columns: int, place: tuple[float, float] | None
) -> None:
    image, geometry = crop.fit(_ramp(height, width), (rows, columns), place)
    assert (image.height, image.width) == (rows, columns) == geometry.target_px
    assert geometry.original_px == (height, width)
    scale = max(rows / height, columns / width)
    top, left = geometry.crop_px
    assert 0 <= top <= max(round(height * scale) - rows, 0) and 0 <= left <= max(round(width * scale) - columns, 0)
    assert min(top, left) == 0  # one side is covered exactly


def test_fit_centres_or_goes_where_it_is_told() -> None:
    wide = _ramp(100, 300)
    assert crop.fit(wide, (100, 100))[1].crop_px == (0, 100)
    assert crop.fit(wide, (50, 50), (0.0, 0.0))[1].crop_px == (0, 0)
    assert crop.fit(wide, (50, 50), (0.999, 0.999))[1].crop_px == (0, 100)
    left, _ = crop.fit(wide, (100, 100), (0.0, 0.0))
    assert np.asarray(left)[..., 1].max() < 90 and np.asarray(left)[..., 0].max() == 255


def test_fit_leaves_a_picture_of_the_right_size_untouched() -> None:
    image = _ramp(64, 64)
    assert crop.fit(image, (64, 64))[0].tobytes() == image.tobytes()


def test_fit_shrinks_as_lanczos_does() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (640, 640, 3), dtype=np.uint8))
    exact = np.asarray(noise.resize((64, 64), Image.Resampling.LANCZOS), dtype=int)
    assert np.abs(np.asarray(crop.fit(noise, (64, 64))[0], dtype=int) - exact).mean() < 3


def test_to_tensor_spans_minus_one_to_one() -> None:
    pixels = crop.to_tensor(_ramp(8, 16))
    assert pixels.shape == (3, 8, 16) and pixels.is_contiguous()
    assert pixels[0, 0, 0] == -1 and pixels[0, -1, 0] == 1 and pixels[1, 0, -1] == 1 and (pixels[2] == -1).all()


@settings(max_examples=60, deadline=None)
@given(SIDES, SIDES, st.floats(0.01, 1), st.tuples(FRACTIONS, FRACTIONS, FRACTIONS))
def test_a_random_part_keeps_its_share_and_aspect(
    height: int, width: int, share: float, draws: tuple[float, float, float]
) -> None:
    part = crop.random_part(_ramp(height, width), share, draws)
    assert share * height * width - 1e-6 <= part.height * part.width <= height * width  # 0.01 * 70 * 70 is over 49
    assert abs(part.height - part.width * height / width) <= 1 + height / width


def test_parts_lie_everywhere() -> None:
    image = _ramp(100, 100)
    corner = np.asarray(crop.random_part(image, 0.25, (0.0, 0.999, 0.0)))
    assert corner.shape == (50, 50, 3) and corner[-1, 0, 0] == 255 and corner[0, 0, 1] == 0


def test_mirror_and_padding() -> None:
    image = _ramp(20, 30)
    assert (np.asarray(crop.mirror(image)) == np.asarray(image)[:, ::-1]).all()
    square = np.asarray(crop.pad_to_square(image, (1, 2, 3)))
    assert square.shape == (30, 30, 3) and (square[5:25] == np.asarray(image)).all()
    assert (square[:5] == (1, 2, 3)).all() and (square[25:] == (1, 2, 3)).all()


@pytest.mark.parametrize("size", [(3, 500), (500, 3)])
def test_long_pictures_are_cut_without_a_word(size: tuple[int, int]) -> None:
    assert crop.fit(_ramp(*size), (64, 32))[0].size == (32, 64)
