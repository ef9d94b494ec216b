"""Timestep densities against their formulas, and that no process, batch or resumption moves a draw."""

from __future__ import annotations

import math
import subprocess
import sys
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling

from ip_adapter_trainer.core.errors import Problem
from ip_adapter_trainer.core.rng import stream
from ip_adapter_trainer.diffusion import NoiseProcess, ObjectiveConfig

COUNT, BINS = 20_000, 10
ALONE = {"timestep_uniform_share": 0.0}
DRAW = """
from ip_adapter_trainer.diffusion import NoiseProcess, ObjectiveConfig
from diffusers import DDIMScheduler
process = NoiseProcess(DDIMScheduler(), ObjectiveConfig(timestep_density={density!r}))
print(process.draw(7, [5, 900, 123456789], (1, 1, 1))[1].tolist())
"""


def timesteps(indices: Any = range(COUNT), seed: int = 0, **config: Any) -> np.ndarray:
    process = NoiseProcess(DDIMScheduler(), ObjectiveConfig(**config))
    return process.draw(seed, indices, (1, 1, 1))[1].numpy()


def shares(t: np.ndarray) -> np.ndarray:
    """Of all draws, in ten equal parts of the range."""
    return np.histogram(t, BINS, (0, 1000))[0] / len(t)


def test_uniform_draws_are_those_of_the_counter_stream() -> None:
    expected = [int(stream(3, "timestep", i).integers(0, 1000)) for i in range(50)]
    assert timesteps(range(50), seed=3, timestep_density="uniform").tolist() == expected
    expected = [int(stream(3, "timestep", i).integers(400, 900)) for i in range(50)]
    limits = {"min_timestep": 400, "max_timestep": 900}
    assert timesteps(range(50), seed=3, timestep_density="uniform", **limits).tolist() == expected


@pytest.mark.parametrize("shift", [1.0, 2.0, 3.0])
def test_shifted_draws_have_the_density_of_the_formula(shift: float) -> None:
    edges = np.linspace(0, 1, BINS + 1)
    cumulative = edges / (shift - (shift - 1) * edges)  # the inverse of u = s v / (1 + (s - 1) v), v uniform
    drawn = shares(timesteps(timestep_density="shifted", timestep_shift=shift, **ALONE))
    assert drawn == pytest.approx(np.diff(cumulative), abs=5 * (0.25 / COUNT) ** 0.5)


def test_by_default_every_part_of_the_range_keeps_a_share_and_all_timesteps_come() -> None:
    t = timesteps(range(2 * COUNT))
    cumulative = np.array([0, *(NormalDist(0.5).cdf(math.log(u / (1 - u))) for u in np.arange(1, BINS) / BINS), 1])
    expected = 0.2 / BINS + 0.8 * np.diff(cumulative)
    assert shares(t) == pytest.approx(expected, abs=5 * (0.125 / COUNT) ** 0.5)
    assert shares(t).min() > 0.2 / BINS
    assert (t.min(), t.max()) == (0, 999) and len(np.unique(t)) == 1000


def test_the_uniform_share_lies_beside_any_density() -> None:
    t = timesteps(timestep_density="shifted", timestep_shift=1e12, timestep_uniform_share=0.25)
    assert (t < 998).mean() == pytest.approx(0.25, abs=5 * (0.25 / COUNT) ** 0.5)
    assert shares(t)[:9] == pytest.approx(0.025, abs=0.01)
    uniform = shares(timesteps(timestep_density="cubic", timestep_uniform_share=1.0))
    assert uniform == pytest.approx(0.1, abs=0.015)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.5, 1.0), (-1.0, 0.5)])
def test_logit_normal_draws_are_distributed_as_diffusers_draws_them(mean: float, std: float) -> None:
    generator = torch.Generator().manual_seed(0)
    theirs = compute_density_for_timestep_sampling("logit_normal", COUNT, mean, std, generator=generator).numpy()
    ours = timesteps(timestep_density="logit_normal", logit_mean=mean, logit_std=std, **ALONE)
    assert shares(ours) == pytest.approx(shares(1000 * theirs), abs=7 * (0.25 / COUNT) ** 0.5)


def test_cubic_draws_have_the_density_of_the_formula() -> None:
    cumulative = 1 - np.cbrt(1 - np.linspace(0, 1, BINS + 1))
    drawn = shares(timesteps(timestep_density="cubic", **ALONE))
    assert drawn == pytest.approx(np.diff(cumulative), abs=5 * (0.25 / COUNT) ** 0.5)


@pytest.mark.parametrize("density", ["uniform", "logit_normal"])  # the others take the second one's way
def test_draws_belong_to_the_image_whatever_the_process_batch_or_resumption(density: str) -> None:
    indices = [5, 900, 123456789]
    together = timesteps(indices, seed=7, timestep_density=density).tolist()
    alone = [int(timesteps([i], seed=7, timestep_density=density)[0]) for i in reversed(indices)]
    command = [sys.executable, "-c", DRAW.format(density=density)]
    other = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert alone == together[::-1] and other.strip() == str(together)


@pytest.mark.parametrize("density", ["shifted", "logit_normal", "cubic"])
def test_every_density_stays_in_the_range_asked_for(density: str) -> None:
    t = timesteps(range(2000), timestep_density=density, min_timestep=400, max_timestep=500)
    assert t.min() >= 400 and t.max() < 500 and len(np.unique(t)) > 80
    with pytest.raises(Problem, match="no timesteps"):
        timesteps([0], timestep_density=density, min_timestep=1000)


def test_the_strongest_noise_is_the_last_timestep_of_the_range() -> None:
    t = timesteps(range(2000), timestep_density="shifted", timestep_shift=1e12, **ALONE)
    assert set(t.tolist()) <= {998, 999}
