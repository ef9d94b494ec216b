"""Ladders of sizes, and which picture goes where."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ip_adapter_trainer.images.background import parse_colour
from ip_adapter_trainer.images.buckets import Buckets

LADDERS = st.tuples(st.integers(1, 8), st.integers(1, 20), st.floats(1, 4))


@given(LADDERS)
def test_a_ladder_keeps_its_promises(ladder: tuple[int, int, float]) -> None:
    eights, steps, max_aspect = ladder
    step_px = 8 * eights
    resolution_px = steps * step_px
    sizes = Buckets.ladder(resolution_px, step_px=step_px, max_aspect=max_aspect).sizes_px
    assert (resolution_px, resolution_px) in sizes
    assert {(width, height) for height, width in sizes} == set(sizes)
    for height, width in sizes:
        assert height % step_px == width % step_px == 0
        assert height * width <= resolution_px**2
        assert max(height, width) <= max_aspect * min(height, width)
        assert (max(height, width) + step_px) * min(height, width) > resolution_px**2


def test_the_usual_ladder() -> None:
    half = [(512, 512), (576, 448), (640, 384)]
    assert Buckets.ladder(512, step_px=64, max_aspect=2).sizes_px == (*[(w, h) for h, w in half[:0:-1]], *half)


@given(LADDERS, st.integers(1, 4000), st.integers(1, 4000))
def test_nearest_is_nearest_in_log_aspect(ladder: tuple[int, int, float], height: int, width: int) -> None:
    buckets = Buckets.ladder(ladder[1] * 64, step_px=64, max_aspect=ladder[2])
    distances = [abs(math.log(height / width) - math.log(h / w)) for h, w in buckets.sizes_px]
    assert distances[buckets.nearest((height, width))] == pytest.approx(min(distances), abs=1e-9)


def test_one_square_bucket_takes_everything() -> None:
    buckets = Buckets.square(512)
    assert buckets.sizes_px == ((512, 512),) and buckets.nearest((1, 900)) == 0 and len(buckets) == 1


def test_a_step_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="bucket_step_px 64"):
        Buckets.ladder(520, step_px=64, max_aspect=2)


def test_colours() -> None:
    assert parse_colour("gray") == (128, 128, 128) and parse_colour("#0aFF10") == (10, 255, 16)
    for wrong in ("", "pink", "#123", "#gggggg", "#1234567"):
        with pytest.raises(ValueError, match="no colour"):
            parse_colour(wrong)
