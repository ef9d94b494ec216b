"""Variance-preserving diffusion as training sees it: noisy latents, target, weight.

Written on diffusers' `DDPMScheduler` and `compute_snr`. With x the latents, e the noise and a_t the cumulative alpha
(Ho et al. 2006.11239, eq. 4; Salimans & Ho 2202.00512, eq. 6)::

    x_t = sqrt(a_t) x + sqrt(1 - a_t) e
    target = e (epsilon) | sqrt(a_t) e - sqrt(1 - a_t) x (v_prediction) | x (sample)
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from ip_adapter_trainer.core.errors import Problem
from ip_adapter_trainer.core.settings import Part, Resume

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.random import Generator
    from torch import Tensor


Density = Literal["uniform", "shifted", "logit_normal", "cubic"]


class ObjectiveConfig(Part):
    """Settings of latents, timesteps and loss weights."""

    group = "Objective"
    resume = Resume(
        must_match="latents noise_offset snr_gamma min_timestep max_timestep timestep_density logit_mean logit_std "
        "timestep_shift timestep_uniform_share"
    )

    latents: Literal["sample", "mean"] = Field(
        "sample", description="Latents of an image: drawn from the VAE's posterior, or its mean."
    )
    noise_offset: float = Field(0.0, ge=0, description="Weight of a constant per image and channel added to the noise.")
    snr_gamma: float | None = Field(
        None, gt=0, description="Gamma of min-SNR loss weights (arXiv 2303.09556); 5.0 is usual."
    )
    min_timestep: int = Field(0, ge=0, description="First timestep that training draws; higher: only stronger noise.")
    max_timestep: int | None = Field(
        None, gt=0, description="Timestep before which training draws; None: all of the scheduler's."
    )
    timestep_density: Density = Field(
        "logit_normal",
        description="How often which timestep of that range is drawn: uniform; logit_normal, most around the middle; "
        "shifted, ever more towards strong noise; cubic, the strongest above all.",
    )
    logit_mean: float = Field(0.5, description="Of logit_normal: above 0 leads to stronger noise.")
    logit_std: float = Field(1.0, gt=0, description="Of logit_normal: smaller stays closer to its middle.")
    timestep_shift: float = Field(
        3.0, gt=0, description="Of shifted: times the uniform density at the strongest noise."
    )
    timestep_uniform_share: float = Field(
        0.2, ge=0, le=1, description="Share of images whose timestep is uniform whatever the density, so that all come."
    )


class NoiseProcess:
    """The base model's own noise process, of its scheduler's betas.

    Attributes:
        prediction: what the denoiser predicts, one of `schedulers.PREDICTIONS`.
    """

    def __init__(self, scheduler: Any, config: ObjectiveConfig) -> None:
        from diffusers import DDPMScheduler

        self.config, own = config, scheduler.config
        self.prediction: str = own.get("prediction_type", "epsilon")
        # Betas as the class itself makes them, defaults included; DDPM's scheduler rescales them as the paper does.
        betas = type(scheduler).from_config({**own, "rescale_betas_zero_snr": False}).betas
        self.scheduler: Any = DDPMScheduler(
            num_train_timesteps=len(betas),
            trained_betas=betas.tolist(),
            prediction_type=self.prediction,
            rescale_betas_zero_snr=bool(own.get("rescale_betas_zero_snr")),
        )
        self.drawn = config.min_timestep, config.max_timestep or self.num_timesteps  # first, and the one after the last
        if not self.drawn[0] < self.drawn[1] <= self.num_timesteps:
            what = f"no timesteps from {self.drawn[0]} to {self.drawn[1]}: the base model has {self.num_timesteps}"
            raise Problem(what, where="--min_timestep --max_timestep", remedy="leave them out, or give a smaller range")

    @property
    def num_timesteps(self) -> int:
        """Number of discrete timesteps."""
        return int(self.scheduler.config.num_train_timesteps)

    def draw(self, seed: int, indices: Sequence[int], shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
        """Draw noise [B, C, h, w] and timesteps [B], of the range and density asked for, from counter streams."""
        import numpy as np
        import torch

        from ip_adapter_trainer.core.rng import stream

        noise = np.empty((len(indices), *shape), np.float32)
        timesteps = np.empty(len(indices), np.int64)
        for place, index in enumerate(indices):
            rng = stream(seed, "noise", index)
            rng.standard_normal(out=noise[place], dtype=np.float32)
            if self.config.noise_offset:
                noise[place] += self.config.noise_offset * rng.standard_normal((shape[0], 1, 1), dtype=np.float32)
            timesteps[place] = self._timestep(stream(seed, "timestep", index))
        return torch.from_numpy(noise), torch.from_numpy(timesteps)

    def _timestep(self, rng: Generator) -> int:
        config, (first, end) = self.config, self.drawn
        if config.timestep_density == "uniform":
            return int(rng.integers(first, end))
        if config.timestep_uniform_share and rng.random() >= 1 - config.timestep_uniform_share:
            place = rng.random()
        elif config.timestep_density == "logit_normal":
            place = _logit_normal(rng, config.logit_mean, config.logit_std)
        elif config.timestep_density == "shifted":
            place = _shifted(rng, config.timestep_shift)
        else:
            place = _cubic(rng)
        return min(first + int(place * (end - first)), end - 1)  # the place 1 itself is the last one's

    def posterior(self, normal: Tensor) -> Tensor:
        """Return the noise [B, C, h, w] that samples the VAE's posterior: zeros where its mean is trained on."""
        import torch

        return normal if self.config.latents == "sample" else torch.zeros_like(normal)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return x_t of latents, noise [B, C, h, w] and timesteps [B]."""
        noisy: Tensor = self.scheduler.add_noise(latents, noise, timesteps)
        return noisy

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the output that the denoiser is trained towards, [B, C, h, w]."""
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "sample":
            return latents
        velocity: Tensor = self.scheduler.get_velocity(latents, noise, timesteps)
        return velocity

    def weights(self, timesteps: Tensor) -> Tensor:
        """Return loss weights [B]: ones, or min(SNR, gamma) over the weight that the prediction type implies by itself.

        Squared errors of epsilon, v and x weigh the error in x by SNR, SNR + 1 and 1 (2303.09556, section 3.4).
        """
        import torch
        from diffusers.training_utils import compute_snr

        if self.config.snr_gamma is None:
            return torch.ones_like(timesteps, dtype=torch.float32)
        snr = compute_snr(self.scheduler, timesteps).float()
        implied = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}[self.prediction]
        return snr.clamp(max=self.config.snr_gamma) / implied.clamp(min=1e-8)


# Densities draw a place u in 0..1 on the way from the weakest to the strongest noise that is trained. What an image
# looks like as a whole is decided while the noise is strong, detail at weak noise.


def _shifted(rng: Generator, shift: float) -> float:
    """Draw u = s v / (1 + (s - 1) v) of a uniform v (Stable Diffusion 3, arXiv 2403.03206, eq. 23).

    Its density is s / (s - (s - 1) u)^2, from 1 / s times the uniform one at the weakest noise to s times at the
    strongest: every timestep keeps a share.
    """
    v = rng.random()
    return shift * v / (1 + (shift - 1) * v)


def _logit_normal(rng: Generator, mean: float, std: float) -> float:
    """Draw u = sigmoid(mean + std z) of a normal z, as diffusers' `compute_density_for_timestep_sampling` does.

    From 2403.03206, section 3.1. A mean above 0 leads to stronger noise; both ends are all but never drawn.
    """
    return 1 / (1 + math.exp(-rng.normal(mean, std)))


def _cubic(rng: Generator) -> float:
    """Draw u = 1 - v^3 of a uniform v: the strongest noise above all (T2I-Adapter, arXiv 2302.08453)."""
    return 1 - rng.random() ** 3
