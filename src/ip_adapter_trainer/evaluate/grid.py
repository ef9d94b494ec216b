"""The picture grid: reference | scale 0 | 0.5 | 1, one row an image prompt, the same noise along a row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ip_adapter_trainer.adapters import IMAGE
from ip_adapter_trainer.core.values import Batch, Pixels
from ip_adapter_trainer.evaluate.config import ValidationConfig
from ip_adapter_trainer.evaluate.grid_layout import CELL_PX, draw_grid
from ip_adapter_trainer.evaluate.sample import Sampling, grouped, image_features, sample, select
from ip_adapter_trainer.model import Features, Model
from ip_adapter_trainer.runtime.stopping import Poll, no_poll

if TYPE_CHECKING:
    from PIL.Image import Image

SCALES = (0.0, 0.5, 1.0)
HEADINGS = ("reference", *(f"scale {scale:g}" for scale in SCALES))


def grid(
    model: Model,
    references: Sequence[Image],
    prompts: Sequence[str],
    seeds: Sequence[int],
    how: Sampling,
    poll: Poll = no_poll,
    blocks: int = 1,
    cell_px: tuple[int, int] = CELL_PX,
) -> Image:
    """Draw the grid of some RGB images, a row each with its own text and seed; see `sample` and `draw_grid`."""
    features = image_features(model, [[reference] for reference in references])
    rows = _rows(model, references, features, prompts, seeds, how, poll)
    return draw_grid(HEADINGS, rows, prompts, blocks, cell_px)


def validation_grid(
    model: Model,
    batches: Sequence[Batch],
    config: ValidationConfig,
    poll: Poll = no_poll,
    features: Features | None = None,
) -> Image:
    """Draw the grid of the first `grid_rows` rows of some batches of pixels, each at the size of its target.

    No more images are drawn at once than a batch has. Where image prompts were encoded before, their features [R, ...]
    are taken.
    """
    rows: list[list[Image]] = []
    prompts: list[str] = []
    for batch in batches:
        first, shown = len(rows), min(len(batch), config.grid_rows - len(rows))
        if not shown:
            break
        assert isinstance(batch.inputs, Pixels)
        height_px, width_px = batch.inputs.pixels.shape[-2:]
        how = Sampling(height_px, width_px, config.grid_steps, config.grid_guidance_scale)
        prompted = {role: pixels[:shown] for role, pixels in batch.inputs.prompts.items()}
        part = slice(first, first + shown)
        seen = model.features(prompted) if features is None else select(features, part)
        texts = batch.text[:shown] if config.grid_prompt is None else [config.grid_prompt] * shown
        seeds = [config.validation_seed + place for place in range(part.start, part.stop)]
        references = as_seen(model.encoder.preprocess, prompted[IMAGE])
        rows += _rows(model, references, grouped(seen, shown), texts, seeds, how, poll)
        prompts += texts
    return draw_grid(HEADINGS, rows, prompts)


def _rows(
    model: Model,
    references: Sequence[Image],
    features: Features,
    prompts: Sequence[str],
    seeds: Sequence[int],
    how: Sampling,
    poll: Poll,
) -> list[list[Image]]:
    """Each row's reference and drawings; features are [P, 1, ...]."""
    columns = [sample(model, features, prompts, seeds, replace(how, scale=scale), poll) for scale in SCALES]
    return [list(row) for row in zip(references, *columns, strict=True)]


def as_seen(preprocess: Callable[[Image], Tensor], pixels: Tensor) -> list[Image]:
    """Return images of preprocessed pixels [B, 3, S, S], as the encoder saw them.

    The normalisation to undo is read off a black and a white image.
    """
    from PIL import Image as images

    size = (pixels.shape[-1], pixels.shape[-2])
    black, white = (preprocess(images.new("RGB", size, colour)) for colour in ("black", "white"))
    shares = ((pixels.cpu() - black) / (white - black)).clamp(0, 1)
    samples = (shares * 255).round().to(torch.uint8).permute(0, 2, 3, 1)  # [B, S, S, 3]
    return [images.fromarray(part.numpy()) for part in samples]
