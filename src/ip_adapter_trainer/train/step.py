"""One micro batch to a loss: encode, noise, predict, compare. The arithmetic of training, and nothing else."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ip_adapter_trainer.core.devices import to_device
from ip_adapter_trainer.core.rng import stream
from ip_adapter_trainer.core.values import Batch, TextCondition
from ip_adapter_trainer.diffusion import NoiseProcess
from ip_adapter_trainer.model import Model


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
        noise, timesteps = self.process.draw(self.seed, batch.index.tolist(), tuple(latents.shape[1:]))  # type: ignore[arg-type]
        noise, timesteps = to_device(noise, self.device), to_device(timesteps, self.device)
        noisy = self.process.add_noise(latents, noise, timesteps)
        tokens = self.model.project(features)
        prediction = self.model.predict(noisy.to(self.model.dtype), timesteps, text, tokens)
        target = self.process.target(latents, noise, timesteps)
        error = (prediction.float() - target).square().mean((1, 2, 3))  # [B]
        return (error * self.process.weights(timesteps)).mean()

    @torch.no_grad()
    def encode(self, batch: Batch) -> tuple[Tensor, TextCondition, Tensor]:
        """Encode a batch: latents [B, C, h, w] in fp32, text condition, image features [B, ...]."""
        model, batch = self.model, batch.to(self.device)
        moments = model.moments_of(batch.inputs)  # [B, 2C, h, w]
        shape = (moments.shape[1] // 2, *moments.shape[2:])
        normal = [stream(self.seed, "posterior", i).standard_normal(shape, np.float32) for i in batch.index.tolist()]
        latents = model.family.sample_latents(moments, self.process.posterior(torch.from_numpy(np.stack(normal))))
        text = model.text_of(batch)
        return latents, text, model.features_of(batch.inputs, batch.drop_image)
