"""Validation losses: repeatable, free of batching, and a gap where an adapter has learned its pictures."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from ip_adapter_trainer.core.errors import Stopped
from ip_adapter_trainer.diffusion.objective import NoiseProcess, ObjectiveConfig
from ip_adapter_trainer.evaluate.losses import BANDS, Gap, ValidationReport, validation_losses
from ip_adapter_trainer.evaluate.shuffle import others
from ip_adapter_trainer.model import Model
from tests.evaluate.things import batch, process


def test_the_same_report_twice_bit_for_bit(some_model: Model) -> None:
    rows, known = [batch(some_model, [0, 1, 2])], process(some_model)
    first = validation_losses(some_model, known, rows, seed=1)
    assert first == validation_losses(some_model, known, rows, seed=1)
    assert first != validation_losses(some_model, known, rows, seed=2)
    assert not some_model.is_attached and some_model.prompt.tokens is None


def test_neither_batch_size_nor_order_matters(sd1: Model) -> None:
    whole = validation_losses(sd1, process(sd1), [batch(sd1, [3, 5, 8, 9])], seed=0).as_metrics()
    parts = validation_losses(sd1, process(sd1), [batch(sd1, [9, 3, 8]), batch(sd1, [5])], seed=0).as_metrics()
    assert whole == pytest.approx(parts, rel=1e-4, abs=1e-7)


def test_metrics_are_json_and_bands_average_to_the_loss(sd1: Model) -> None:
    found = validation_losses(sd1, process(sd1), [batch(sd1, [0, 1])], seed=0)
    metrics = json.loads(json.dumps(found.as_metrics()))
    bands = [value for name, value in metrics.items() if name.startswith("validation/loss_t")]
    assert len(bands) == BANDS and np.mean(bands) == pytest.approx(metrics["validation/loss"])
    assert [*found.by_band][0::4] == [(0, 199), (800, 999)]
    for name in ("shuffled", "none"):
        gap = metrics[f"validation/loss_{name}"] - metrics["validation/loss"]
        assert metrics[f"validation/gap_{name}"] == pytest.approx(gap, abs=1e-9)
        assert metrics[f"validation/gap_{name}_relative"] == pytest.approx(gap / metrics["validation/loss"], abs=1e-9)


def test_one_row_has_no_shuffle_and_no_error(sd1: Model) -> None:
    found = validation_losses(sd1, process(sd1), [batch(sd1, [4])], seed=0)
    assert set(found.losses) == {"right", "none"} and set(found.gaps) == {"none"}
    assert "validation/loss_shuffled" not in found.as_metrics() and "shuffled" not in found.summary("rows")
    assert "±" not in found.summary("rows") and "too few images" in found.summary("rows")


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 6), max_size=30))
def test_nobody_is_shuffled_onto_its_own_image(images: list[int]) -> None:
    partners = others(images, 3, "test")
    if len(set(images)) < 2:
        assert partners is None
        return
    assert partners is not None and all(images[partner] != own for own, partner in zip(images, partners, strict=True))
    if 2 * max(map(images.count, images)) <= len(images):
        assert sorted(partners) == list(range(len(images)))


def report(rows: int, shuffled: tuple[float, float], none: tuple[float, float]) -> ValidationReport:
    """Of gaps with their standard errors, beside a loss of one."""
    gaps = {"shuffled": Gap(*shuffled, 1.0), "none": Gap(*none, 1.0)}
    return ValidationReport(rows, {"right": 1.0, "shuffled": 1 + shuffled[0], "none": 1 + none[0]}, gaps, {})


SURE, UNSURE, WORSE = (0.5, 0.1), (0.5, 0.3), (-0.5, 0.1)


@pytest.mark.parametrize(
    ("rows", "shuffled", "none", "verdict"),
    [
        (8, SURE, SURE, "the image prompt is used"),
        (7, SURE, SURE, "too few images"),
        (8, SURE, UNSURE, "no better than none"),
        (8, UNSURE, SURE, "no more than another"),
        (8, UNSURE, UNSURE, "no sign yet"),
        (8, SURE, WORSE, "worse than none does"),
    ],
)
def test_the_verdict_needs_rows_and_both_gaps(
    rows: int, shuffled: tuple[float, float], none: tuple[float, float], verdict: str
) -> None:
    found = report(rows, shuffled, none)
    assert verdict in found.summary("rows") and found.is_used == (verdict == "the image prompt is used")


@pytest.mark.parametrize(
    ("unseen", "overfits"),
    [
        (report(8, SURE, SURE), False),
        (report(8, SURE, (0.2, 0.01)), True),
        (report(8, UNSURE, UNSURE), False),
        (report(8, UNSURE, (0.0, 0.1)), True),
        (report(8, SURE, WORSE), True),
        (report(7, SURE, WORSE), False),
    ],
)
def test_over_fitting_is_a_gain_that_unseen_rows_do_not_have(unseen: ValidationReport, overfits: bool) -> None:
    assert report(8, SURE, SURE).overfits(unseen) == overfits
    assert not report(8, SURE, UNSURE).overfits(unseen)


def test_random_adapters_are_not_used(sd1: Model) -> None:
    """Of 24, told by one row, 7 were; by chance alone a gap is above two standard errors once in 23."""
    rows = [batch(sd1, list(range(8)))]
    used = 0
    for seed in range(8):
        torch.manual_seed(seed)
        for parameter in sd1.adapter.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        used += validation_losses(sd1, process(sd1), rows, seed).is_used
    assert used <= 1


def colours(pixels: torch.Tensor) -> torch.Tensor:
    """Sharp moments whose scaled latents keep a picture's colours, as those of a random autoencoder do not."""
    small = torch.nn.functional.avg_pool2d(pixels, 4) / 0.18215
    mean = torch.cat([small, small.mean(1, keepdim=True)], 1)
    return torch.cat([mean, torch.full_like(mean, -30.0)], 1)


def overfit(model: Model, known: NoiseProcess, numbers: list[int], steps: int) -> None:
    """Teaches the adapter the latents of a few rows from their pictures, under noise that hides them."""
    rows, shape = batch(model, numbers), model.codec.latent_shape(32, 32)
    features, text = model.features_of(rows.inputs), model.text_of(rows)
    latents = model.codec.latents(model.moments_of(rows.inputs), torch.zeros(len(rows), *shape))
    optimizer = torch.optim.AdamW(model.adapter.parameters(), lr=1e-2)
    with model.attached():
        for step in range(steps):
            noise, t = known.draw(0, range(step * len(rows), (step + 1) * len(rows)), shape)
            noisy = known.add_noise(latents, noise, t)
            prediction = model.predict(noisy, t, text, rows.geometry, model.project(features))
            loss = (prediction - known.target(latents, noise, t)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def test_an_adapter_that_knows_its_rows_shows_the_gap(sd1: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sd1.codec, "moments", colours)
    numbers = [*range(8)]
    known = NoiseProcess(DDIMScheduler(prediction_type="sample"), ObjectiveConfig())
    fresh = validation_losses(sd1, known, [batch(sd1, numbers)], seed=0)
    overfit(sd1, known, numbers, steps=40)
    learned = validation_losses(sd1, known, [batch(sd1, numbers)], seed=0)
    assert learned.losses["right"] < fresh.losses["right"]
    assert learned.is_used and not fresh.is_used


def test_a_stop_passes_through_and_leaves_the_model_as_found(sd1: Model) -> None:
    calls = 0

    def poll() -> None:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise Stopped(143)

    for attached in (False, True):
        calls = 0
        if attached:
            sd1.attach()
        sd1.prompt.scale = 0.25
        with pytest.raises(Stopped):
            validation_losses(sd1, process(sd1), [batch(sd1, [0, 1])], seed=0, poll=poll)
        assert sd1.is_attached == attached and sd1.prompt.scale == 0.25 and sd1.adapter.training
        assert torch.is_grad_enabled()
