"""The grid: its scale 0 cells are the base pipeline's pictures, its layout holds pictures of any size."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from ip_adapter_trainer.evaluate import grid_layout
from ip_adapter_trainer.evaluate.config import ValidationConfig
from ip_adapter_trainer.evaluate.grid import HEADINGS, as_seen, grid, validation_grid
from ip_adapter_trainer.evaluate.sample import Sampling, image_features, initial_latents, sample
from ip_adapter_trainer.model import Model
from tests.evaluate.things import batch, image

HOW = Sampling(height_px=32, width_px=32, steps=2, scheduler="auto")


def cell(drawn: Image.Image, row: int, column: int, rows: int, captions: bool) -> np.ndarray:
    """The 160 px cell of a grid of 32 px pictures, reduced to the picture in it."""
    left, top = grid_layout.GridLayout(160, (160,) * rows, len(HEADINGS), captions).corner(row, column)
    pixels = np.asarray(drawn)[top : top + 160, left : left + 160]
    small = pixels[::5, ::5]
    assert np.array_equal(pixels, small.repeat(5, 0).repeat(5, 1)), "enlarged by a whole factor"
    return small


def test_cells_are_the_pictures_of_their_scales_bit_for_bit(sd1: Model) -> None:
    references, prompts, seeds = [image(1, 32, 32), image(2, 32, 32)], ["a red star", ""], [7, 8]
    drawn = grid(sd1, references, prompts, seeds, HOW)
    assert not sd1.is_attached
    latents = initial_latents(sd1, seeds, 32, 32)
    base = sd1.denoiser.pipeline(prompts, latents=latents, height=32, width=32, num_inference_steps=2).images
    full = sample(sd1, image_features(sd1, [[r] for r in references]), prompts, seeds, HOW)
    half = sample(sd1, image_features(sd1, [[r] for r in references]), prompts, seeds, replace(HOW, scale=0.5))
    for row in range(2):
        for column, expected in enumerate((references[row], base[row], half[row], full[row])):
            assert np.array_equal(cell(drawn, row, column, 2, captions=True), np.asarray(expected))


@pytest.mark.parametrize(("grid_prompt", "has_captions"), [("", False), (None, True), ("a heart", True)])
def test_validation_grid_takes_its_rows_from_batches(sd1: Model, grid_prompt: str | None, has_captions: bool) -> None:
    config = ValidationConfig(grid_rows=3, grid_steps=1, grid_prompt=grid_prompt, validation_seed=5)
    batches = [batch(sd1, [0]), batch(sd1, [1, 2, 3])]
    drawn = validation_grid(sd1, batches, config)
    texts = ["a red star", "a blue circle", ""] if grid_prompt is None else [grid_prompt] * 3
    how = Sampling(32, 32, steps=1)
    expected = sample(sd1, None, texts, [5, 6, 7], how)
    for row in range(3):
        assert np.array_equal(cell(drawn, row, 1, 3, has_captions), np.asarray(expected[row]))
    assert drawn.height == grid_layout.GridLayout(160, (160,) * 3, 4, has_captions).size_px[1]


def test_rows_of_several_sizes_are_drawn_each_at_its_own(sd1: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    from ip_adapter_trainer.evaluate import grid as module

    seen: list[list[tuple[int, int]]] = []

    def keep(headings: object, rows: list[list[Image.Image]], captions: object) -> Image.Image:
        seen.extend([p.size for p in row] for row in rows)
        return rows[0][0]

    monkeypatch.setattr(module, "draw_grid", keep)
    square, tall = batch(sd1, [0, 1]), batch(sd1, [2])
    tall = replace(tall, inputs=replace(tall.inputs, pixels=torch.zeros(1, 3, 48, 24)))
    validation_grid(sd1, [square, tall, replace(square, index=torch.tensor([3, 4]))], ValidationConfig(grid_steps=1))
    assert seen == [[(32, 32)] * 4, [(32, 32)] * 4, [(32, 32)] + [(24, 48)] * 3, [(32, 32)] * 4]


def test_the_encoders_view_is_the_picture_it_was_given(sd1: Model) -> None:
    given = image(3, 32, 32)
    (seen,) = as_seen(sd1.encoder.preprocess, sd1.encoder.preprocess(given)[None])
    assert np.array_equal(np.asarray(seen), np.asarray(given))


@pytest.mark.parametrize(
    ("size", "shown"),
    [((32, 32), (160, 160)), ((100, 50), (200, 100)), ((400, 300), (400, 300)), ((1024, 512), (512, 256))],
)
def test_sizes_in_the_sheet(size: tuple[int, int], shown: tuple[int, int]) -> None:
    drawn = grid_layout.draw_grid(["a"], [[Image.new("RGB", size)]], [""])
    layout = grid_layout.GridLayout(shown[0], (shown[1],), 1, False)
    left, top = layout.corner(0, 0)
    black = np.argwhere((np.asarray(drawn)[top - 1 :] == 0).all(-1))
    assert drawn.size == layout.size_px
    assert (black.min(0) == (1, left)).all() and (np.ptp(black, 0) + 1 == shown[::-1]).all()


@pytest.mark.parametrize("rows", [4, 3])
def test_rows_go_on_in_the_next_block_each_with_its_text_over_what_was_drawn(rows: int) -> None:
    colours = [(200, 10 * row, 0) for row in range(rows)]
    cells = [[Image.new("RGB", (32, 32), colour)] * 4 for colour in colours]
    drawn = np.asarray(grid_layout.draw_grid(HEADINGS, cells, ["a star", "", "a cross", ""][:rows], 2, (96, 512)))
    layout = grid_layout.GridLayout(96, (96, 96), 4, True, blocks=2)
    assert drawn.shape[1::-1] == layout.size_px and layout.size_px[0] > 900
    for row, colour in enumerate(colours):
        left, top = layout.corner(row, 3)
        assert (drawn[top : top + 96, left : left + 96] == colour).all()
        assert layout.corner(row, 0)[1] == layout.corner((row + 2) % 4, 0)[1], "side by side"
        line = drawn[top - layout.caption_px : top - 1]
        reference, outputs = layout.corner(row, 0)[0], layout.corner(row, 1)[0]
        assert (line[:, reference : outputs - 8] == 255).all(), "nothing over the reference"
        assert (line[:, outputs : left + 96] < 128).any() == (row % 2 == 0)


def test_long_captions_are_shortened_and_strange_ones_drawn() -> None:
    cells = [[Image.new("RGB", (32, 32))] * 4] * 3
    began = time.monotonic()
    drawn = grid_layout.draw_grid(HEADINGS, cells, ["long " * 1000, "two\nlines", "日本語 ☂"])
    assert time.monotonic() - began < 5, "generous: a caption is not measured as often as it has letters"
    margin = np.asarray(drawn)[:, -12:]
    assert (margin == 255).all()
