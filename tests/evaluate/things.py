"""What the tests of evaluation share: pictures, batches, and sets of tiny models."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from ip_adapter_trainer.core.values import Batch, Geometry, Pixels
from ip_adapter_trainer.diffusion.objective import NoiseProcess, ObjectiveConfig
from ip_adapter_trainer.model import Model

CAPTIONS = ("a red star", "a blue circle", "", "a green cross on a sand background", "a pink heart", "a cyan square")


def image(number: int, width_px: int = 40, height_px: int = 36) -> Image.Image:
    """A picture of noise over a colour, other for every number."""
    rng = np.random.default_rng(number)
    pixels = rng.integers(0, 256, 3) * 0.7 + rng.integers(0, 77, (height_px, width_px, 3))
    return Image.fromarray(pixels.astype(np.uint8))


def batch(model: Model, numbers: list[int]) -> Batch:
    """Rows of the given numbers at 32 px, prompted with themselves."""
    targets = [np.asarray(image(n, 32, 32), np.float32) / 127.5 - 1 for n in numbers]
    size = (32, 32)
    return Batch(
        index=torch.tensor(numbers),
        row=torch.tensor(numbers),
        inputs=Pixels(
            torch.from_numpy(np.stack(targets)).permute(0, 3, 1, 2).contiguous(),
            {"image": torch.stack([model.encoder.preprocess(image(n)) for n in numbers])},
        ),
        text=tuple(CAPTIONS[n % len(CAPTIONS)] for n in numbers),
        geometry=tuple(Geometry(size, (0, 0), size) for _ in numbers),
        drop_text=torch.zeros(len(numbers), dtype=torch.bool),
        drop_image=torch.zeros(len(numbers), dtype=torch.bool),
    )


def process(model: Model) -> NoiseProcess:
    """The base model's own noise process."""
    return NoiseProcess(model.denoiser.pipeline.scheduler, ObjectiveConfig())
