"""Rows held out of training: no image on both sides, few of few, and mostly the same ones in a set that grew."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ip_adapter_trainer.core.values import Row
from ip_adapter_trainer.manifest.hold_out import hold_out, one_an_image, plain_name, seen_in

ROOT = Path("/data/images")
WAYS = ("", "./", "a/../", "/data/images/", "../images/")  # of writing one path
NAMES = st.builds(lambda number, way: f"{way}{number}.png", st.integers(0, 40), st.sampled_from(WAYS))
ROWS = st.lists(st.builds(Row, NAMES, st.just(""), st.one_of(st.none(), NAMES)), min_size=1, max_size=60)


def images(rows: list[Row]) -> set[str]:
    """Every image that rows name."""
    return {plain_name(name, ROOT) for row in rows for name in (row.image_file, row.prompt_image_file) if name}


def held_names(rows: list[Row]) -> set[str]:
    return {
        plain_name(row.image_file, ROOT) for row, held in zip(rows, hold_out(rows, 0.05, ROOT), strict=True) if held
    }


@settings(max_examples=200, deadline=None)
@given(ROWS, st.sampled_from([0.01, 0.1, 0.4]))
def test_no_image_is_on_both_sides(rows: list[Row], share: float) -> None:
    held = hold_out(rows, share, ROOT)
    sides = [[row for row, is_held in zip(rows, held, strict=True) if is_held == side] for side in (True, False)]
    assert not images(sides[0]) & images(sides[1]) and sides[1]
    targets, all_targets = ({plain_name(row.image_file, ROOT) for row in some} for some in (sides[0], rows))
    assert len(targets) <= max(len(all_targets) // 3, round(share * len(all_targets)))


@pytest.mark.parametrize(
    ("images", "share", "held"),
    [
        (2, 0.01, 0),
        (4, 0.01, 1),
        (24, 0.01, 8),
        (32, 0.01, 8),
        (100, 0.01, 8),
        (2000, 0.01, 20),
        (20, 0.5, 10),
        (9, 0, 0),
    ],
)
def test_few_of_few(images: int, share: float, held: int) -> None:
    rows = [Row(f"{number}.png", "") for number in range(images)]
    assert hold_out(rows, share, ROOT).sum() == held


def test_a_set_that_grew_or_was_put_in_another_order_keeps_its_held_out_images() -> None:
    rows = [Row(f"{number}.png", "") for number in range(1000)]
    more = [Row(f"./{number}.png", "again") for number in (*range(1100), *range(300))][::-1]
    first, second = held_names(rows), held_names(more)
    assert len(first) == 50 and len(first - second) < 10


def test_one_row_of_each_prompt_image() -> None:
    rows = [Row("a.png", ""), Row("./a.png", ""), Row("b.png", "", "a.png"), Row("c.png", "")]
    assert list(one_an_image(rows, [1, 0, 2, 3], ROOT)) == [1, 3]
    assert np.array_equal(hold_out(rows * 9, 0.3, ROOT), np.tile([False, False, False, True], 9))


def test_rows_of_another_set_that_show_the_same_images_are_known() -> None:
    own = [Row("a.png", ""), Row("b.png", "", "c.png")]
    others = [
        Row("images/a.png", ""),
        Row("d.png", "", "images/c.png"),
        Row("a.png", ""),
        Row("/data/images/./b.png", ""),
    ]
    assert seen_in(others, ROOT.parent, own, ROOT).tolist() == [True, True, False, True]
