"""The rows and the chance that both sides get: pictures, captions, noise and timesteps, keyed by image index."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from benchmarks.sizes import SEED, Size
from ip_adapter_trainer.core.rng import stream
from ip_adapter_trainer.core.values import Batch, Geometry, Pixels
from ip_adapter_trainer.diffusion import NoiseProcess

CAPTIONS = ("a red circle on blue", "a large green thing", "a small yellow square on a black background")


@dataclass(frozen=True)
class Draws:
    """Everything that chance decides in a step."""

    posterior: Tensor  # [B, C, h, w] standard normal: where in the VAE's posterior the latents lie
    noise: Tensor  # [B, C, h, w]
    timesteps: Tensor  # [B] int64


def make_batch(size: Size, side_px: int, images: int, device: torch.device | str) -> Batch:
    """A batch of random pictures; of several, the last has its image prompt dropped."""
    numbers = torch.Generator().manual_seed(SEED)
    prompt_px = size.image["image_size"]
    pixels = torch.rand(images, 3, side_px, side_px, generator=numbers) * 2 - 1
    prompts = torch.randn(images, 3, prompt_px, prompt_px, generator=numbers)
    square = (side_px, side_px)
    places = torch.arange(images)
    return Batch(
        index=places,
        row=places,
        inputs=Pixels(pixels, {"image": prompts}),
        text=tuple(CAPTIONS[i % len(CAPTIONS)] for i in range(images)),
        geometry=(Geometry(square, (0, 0), square),) * images,
        drop_text=torch.zeros(images, dtype=torch.bool),
        drop_image=(places == images - 1) & (places > 0),
    ).to(torch.device(device))


def at_step(batch: Batch, step: int) -> Batch:
    """The same rows at another place in the endless order, so with other noise and timesteps."""
    return replace(batch, index=batch.index + step * len(batch))


def draw(process: NoiseProcess, batch: Batch, shape: tuple[int, int, int]) -> Draws:
    """What our step draws for these indices, for the side that has no counter streams.

    Args:
        process: the noise process.
        batch: the rows.
        shape: (C, h, w) of one picture's latents.
    """
    indices = batch.index.tolist()
    posterior = [stream(SEED, "posterior", i).standard_normal(shape, np.float32) for i in indices]
    return Draws(torch.from_numpy(np.stack(posterior)), *process.draw(SEED, indices, shape))
