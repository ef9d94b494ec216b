"""One micro batch to a loss: encode, noise, predict, compare. The arithmetic of training, and nothing else."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ip_adapter_trainer.core.rng import stream
from ip_adapter_trainer.core.values import Batch, to_device
from ip_adapter_trainer.diffusion import NoiseProcess
from ip_adapter_trainer.model import Features, Model, Text


class Step:
    """The loss of a micro batch, every random draw keyed by the image's index."""

    def __init__(self, model: Model, process: NoiseProcess, seed: int, device: torch.device) -> None:
        self.model, self.process, self.seed, self.device = model, process, seed, device

    def __call__(self, batch: Batch) -> Tensor:
        """Weighted mean squared error over a batch, a scalar that reaches the adapter's parameters.

        With x the latents, t and e the image's own timestep and noise, c text and c_i image condition (paper, eq. 6)::

            L = mean_i w(t_i) || target_i - model(x_t, t, c, c_i) ||^2
        """
        latents, text, features = self.encode(batch)
        noise, time = self.process.draw(self.seed, batch.index.tolist(), tuple(latents.shape[1:]))  # type: ignore[arg-type]
        noise, time = to_device(noise, self.device), to_device(time, self.device)
        noisy = self.process.add_noise(latents, noise, time)
        image = self.model.project(features, time, self.dropped(batch))
        prediction = self.model.predict(noisy.to(self.model.dtype), time, text, batch.geometry, image)
        target = self.process.target(latents, noise, time)
        error = (prediction.float() - target).square().mean((1, 2, 3))  # [B]
        return (error * self.process.weights(time)).mean()

    @torch.no_grad()
    def encode(self, batch: Batch) -> tuple[Tensor, Text, Features]:
        """Return what the frozen encoders say of a batch: fp32 latents [B, C, h, w], text, image features."""
        model, batch = self.model, batch.to(self.device)
        moments = model.moments_of(batch.inputs)  # [B, 2C, h, w]
        shape = (moments.shape[1] // 2, *moments.shape[2:])
        normal = [stream(self.seed, "posterior", i).standard_normal(shape, np.float32) for i in batch.index.tolist()]
        latents = model.codec.latents(moments, self.process.posterior(torch.from_numpy(np.stack(normal))))
        return latents, model.text_of(batch), model.features_of(batch.inputs, batch.drop_image)

    def dropped(self, batch: Batch) -> dict[str, Tensor]:
        """Return which images [B] are trained without each thing that the variant drops by itself."""
        return {
            name: to_device(
                torch.tensor([stream(self.seed, f"drop-{name}", i).random() < share for i in batch.index.tolist()]),
                self.device,
            )
            for name, share in self.model.variant.drops.items()
        }
