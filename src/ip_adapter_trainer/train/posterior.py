"""The share of the autoencoder's own noise in the latents.

Latents are drawn from its posterior. One that was trained on without regard to its variance can drown the image in it,
and an adapter then learns from noise: a validation loss of 0.50 where 0.05 was right, and no error.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ip_adapter_trainer.core.log import say
from ip_adapter_trainer.core.values import Batch
from ip_adapter_trainer.model import Model

POSTERIOR_IMAGES = 4
_MUCH = 0.3  # the pocket base has 0.14


def warn_of_posterior_noise(model: Model, batches: Sequence[Batch], device: torch.device) -> None:
    """Tell where the posterior's noise is a large part of what the latents of a few images are."""
    if not batches:  # not one of them can be read, of which training itself tells
        return
    with torch.no_grad():
        share = noise_share([model.moments_of(batch.to(device).inputs) for batch in batches])
    if share > _MUCH:
        say(
            f"WARNING: {share:.0%} of the variance of the VAE's latents is its own noise: give --latents mean, which "
            "leaves it out, or another VAE with --pretrained_vae_model_name_or_path"
        )


def noise_share(moments: Iterable[Tensor]) -> float:
    """Return the mean variance of the posterior over that of its samples, by moments [B, 2C, h, w] of any sizes."""
    flat = torch.cat([m.float().transpose(0, 1).flatten(1) for m in moments], 1)  # [2C, positions]
    mean, log_variance = flat.chunk(2)
    noise = log_variance.clamp(-30, 20).exp().mean(1)
    return float((noise / (noise + mean.var(1)).clamp(min=1e-12)).mean())
