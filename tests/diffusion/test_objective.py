"""Noise, targets and weights against their formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.training_utils import compute_snr

from ip_adapter_trainer.core.errors import Problem
from ip_adapter_trainer.diffusion import NoiseProcess, ObjectiveConfig


def process(scheduler: dict[str, Any] | None = None, **config: Any) -> NoiseProcess:
    made = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, **(scheduler or {}))
    return NoiseProcess(made, ObjectiveConfig(**config))


def draws(p: NoiseProcess, count: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    noise, timesteps = p.draw(0, range(count), (4, 8, 8))
    latents = torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    return latents, noise, timesteps


def test_the_prediction_type_is_the_schedulers_own() -> None:
    assert process().prediction == "epsilon"
    assert process({"prediction_type": "v_prediction"}).prediction == "v_prediction"


def test_noisy_latents_and_velocity_follow_their_equations() -> None:
    p = process({"prediction_type": "v_prediction"})
    latents, noise, t = draws(p)
    a = p.scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    torch.testing.assert_close(p.add_noise(latents, noise, t), a.sqrt() * latents + (1 - a).sqrt() * noise)
    torch.testing.assert_close(p.target(latents, noise, t), a.sqrt() * noise - (1 - a).sqrt() * latents)
    assert torch.equal(process().target(latents, noise, t), noise)
    assert torch.equal(process({"prediction_type": "sample"}).target(latents, noise, t), latents)


def test_a_perfect_v_predictor_recovers_the_latents() -> None:
    p = process({"prediction_type": "v_prediction"})
    latents, noise, t = draws(p)
    a = p.scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    back = a.sqrt() * p.add_noise(latents, noise, t) - (1 - a).sqrt() * p.target(latents, noise, t)
    torch.testing.assert_close(back, latents, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("prediction", "implied"), [("epsilon", 0.0), ("v_prediction", 1.0)])
def test_min_snr_weighs_the_error_in_x_alike_for_every_prediction(prediction: str, implied: float) -> None:
    p = process({"prediction_type": prediction}, snr_gamma=5.0)
    t = torch.tensor([5, 200, 600, 990])
    snr = compute_snr(p.scheduler, t)
    torch.testing.assert_close(p.weights(t), snr.clamp(max=5) / (snr + implied))
    assert torch.equal(process().weights(t), torch.ones(4))


def test_draws_belong_to_the_image_not_to_the_batch() -> None:
    p = process()
    noise, t = p.draw(0, [3, 4, 5], (4, 8, 8))
    alone_noise, alone_t = p.draw(0, [4], (4, 8, 8))
    assert torch.equal(noise[1:2], alone_noise) and torch.equal(t[1:2], alone_t)
    assert not torch.equal(p.draw(1, [4], (4, 8, 8))[0], alone_noise)


def test_timesteps_are_uniform_where_that_is_asked_for() -> None:
    p = process(timestep_density="uniform")
    t = p.draw(0, range(4000), (1, 1, 1))[1].float()
    assert abs(float(t.mean()) - 499.5) < 15 and float(t.min()) < 10 and float(t.max()) > 989


def test_noise_offset_shifts_whole_channels() -> None:
    plain, _ = process().draw(0, range(64), (4, 8, 8))
    offset, _ = process(noise_offset=0.5).draw(0, range(64), (4, 8, 8))
    shift = offset - plain
    torch.testing.assert_close(shift, shift.mean((2, 3), keepdim=True).expand_as(shift), rtol=1e-3, atol=1e-5)
    assert float(shift.mean((2, 3)).std()) == pytest.approx(0.5, rel=0.15)


def test_timesteps_stay_in_the_range_asked_for() -> None:
    _, everywhere = process(timestep_density="uniform").draw(0, range(400), (1, 1, 1))
    assert everywhere.min() < 50 and everywhere.max() > 950
    uniform = process(timestep_density="uniform", min_timestep=400, max_timestep=500)
    _, some = uniform.draw(0, range(400), (1, 1, 1))
    assert set(some.tolist()) <= set(range(400, 500)) and len(set(some.tolist())) > 80
    for wrong in ({"min_timestep": 1000}, {"max_timestep": 1001}, {"min_timestep": 5, "max_timestep": 5}):
        with pytest.raises(Problem, match="no timesteps"):
            process(**wrong)
