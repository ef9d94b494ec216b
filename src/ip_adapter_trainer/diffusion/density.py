"""Timestep densities: how often training looks at which noise.

Each draws a place u in 0..1 on the way from the weakest to the strongest noise that is trained. What a picture looks
like as a whole is decided while the noise is strong, detail at weak noise; a share of the images is drawn uniformly
beside any of them, so that no noise is left out.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from numpy.random import Generator

Density = Literal["uniform", "shifted", "logit_normal", "cubic"]


def shifted(rng: Generator, shift: float) -> float:
    """Draw u = s v / (1 + (s - 1) v) of a uniform v (Stable Diffusion 3, arXiv 2403.03206, eq. 23).

    Its density is s / (s - (s - 1) u)^2, from 1 / s times the uniform one at the weakest noise to s times at the
    strongest: every timestep keeps a share.
    """
    v = rng.random()
    return shift * v / (1 + (shift - 1) * v)


def logit_normal(rng: Generator, mean: float, std: float) -> float:
    """Draw u = sigmoid(mean + std z) of a normal z, as diffusers' `compute_density_for_timestep_sampling` does.

    From 2403.03206, section 3.1. A mean above 0 leads to stronger noise; both ends are all but never drawn.
    """
    return 1 / (1 + math.exp(-rng.normal(mean, std)))


def cubic(rng: Generator) -> float:
    """Draw u = 1 - v^3 of a uniform v: the strongest noise above all (T2I-Adapter, arXiv 2302.08453)."""
    return 1 - rng.random() ** 3
