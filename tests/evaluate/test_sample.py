"""Sampling: the picture that diffusers' own loader draws from the same weights, and the base model's at scale 0."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil

from ip_adapter_trainer.core.errors import Stopped
from ip_adapter_trainer.evaluate.sample import (
    Sampling,
    image_features,
    initial_latents,
    joined_tokens,
    native_size_px,
    sample,
    select,
)
from ip_adapter_trainer.model import Model
from tests.evaluate.things import image

HOW = Sampling(height_px=32, width_px=32, steps=3, scheduler="auto")
PROMPTS, SEEDS = ["a red star", ""], [11, 12]


def pixels(pictures: Sequence[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(p, np.int16) for p in pictures])


def run_pipeline(model: Model, prompts: list[str], seeds: list[int], how: Sampling, **image: Any) -> np.ndarray:
    """The base pipeline as a user would call it."""
    latents = initial_latents(model, seeds, how.height_px, how.width_px)
    drawn = model.denoiser.pipeline(
        prompts, latents=latents, height=how.height_px, width=how.width_px, num_inference_steps=how.steps,
        guidance_scale=how.guidance_scale, **image,
    )  # fmt: skip
    return pixels(drawn.images)


def strengthen(model: Model) -> None:
    """Makes the image prompt count for much, so that an equal picture means an equal prompt."""
    with torch.no_grad():
        for name, parameter in model.adapter.adapter_modules.named_parameters():
            parameter.copy_(torch.randn(parameter.shape) * (0.5 if "to_v" in name else 0.3))


def load_into_diffusers(model: Model, folder: Path) -> None:
    """The adapter's two tables through `load_ip_adapter`, with our encoder and its preprocessing."""
    torch.save(model.adapter.published(), folder / "ip_adapter.bin")
    side = model.encoder.side_px
    extractor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=side)
    model.denoiser.pipeline.register_modules(image_encoder=model.encoder.model, feature_extractor=extractor)
    model.denoiser.pipeline.load_ip_adapter(str(folder), subfolder="", weight_name="ip_adapter.bin")


def test_draws_what_diffusers_draws_from_the_same_weights(model: Model, tmp_path: Path) -> None:
    strengthen(model)
    one, two = image(1), image(2)
    prompts = {"one": ([[one]], one), "both": ([[one, two]], [[one, two]])}  # ours, diffusers'
    guided = replace(HOW, guidance_scale=4.0, scale=0.8)
    ways = {"guided": guided, "unguided": replace(guided, guidance_scale=1.0)}
    drawn = {
        (way, name): pixels(sample(model, image_features(model, ours), PROMPTS, SEEDS, how))
        for way, how in ways.items()
        for name, (ours, _) in prompts.items()
    }
    load_into_diffusers(model, tmp_path)
    model.denoiser.pipeline.set_ip_adapter_scale(0.8)
    for (way, name), ours in drawn.items():
        theirs = run_pipeline(model, PROMPTS, SEEDS, ways[way], ip_adapter_image=prompts[name][1])
        assert abs(ours - theirs).max() <= 1, (way, name)
    assert abs(drawn["guided", "one"] - drawn["guided", "both"]).max() > 8, "the pictures tell prompts apart"


def test_scale_zero_and_no_tokens_are_the_base_pipeline_bit_for_bit(model: Model) -> None:
    base = run_pipeline(model, PROMPTS, SEEDS, HOW)
    features = image_features(model, [[image(1)], [image(2)]])
    assert np.array_equal(pixels(sample(model, features, PROMPTS, SEEDS, replace(HOW, scale=0.0))), base)
    assert np.array_equal(pixels(sample(model, None, PROMPTS, SEEDS, HOW)), base)
    assert np.array_equal(run_pipeline(model, PROMPTS, SEEDS, HOW), base), "the pipeline is what it was"


def test_a_picture_hangs_on_its_own_seed_and_prompt_alone(sd1: Model) -> None:
    strengthen(sd1)
    features = image_features(sd1, [[image(n)] for n in range(3)])
    last = select(features, slice(2, 3))
    prompts = ["a red star", "", "a pink heart"]
    together = pixels(sample(sd1, features, prompts, [5, 6, 7], HOW))
    alone = pixels(sample(sd1, last, prompts[2:], [7], HOW))
    in_parts = pixels(sample(sd1, features, prompts, [5, 6, 7], replace(HOW, batch_images=1)))
    assert abs(together[2:] - alone).max() <= 1 and abs(together - in_parts).max() <= 1
    assert abs(together[2:] - pixels(sample(sd1, last, prompts[2:], [8], HOW))).max() > 8


@pytest.mark.parametrize("scheduler", ["ddim", "euler", "dpm++"])
def test_every_scheduler_draws_and_the_pipelines_own_is_untouched(sd1: Model, scheduler: Any) -> None:
    own = sd1.denoiser.pipeline.scheduler
    own.set_timesteps(7)
    config, timesteps = dict(sd1.denoiser.pipeline.config), own.timesteps.clone()
    (drawn,) = sample(sd1, None, ["a red star"], [1], replace(HOW, scheduler=scheduler))
    assert drawn.size == (32, 32)
    assert sd1.denoiser.pipeline.scheduler is own and torch.equal(own.timesteps, timesteps)
    assert dict(sd1.denoiser.pipeline.config) == config


def test_the_negative_prompt_counts(sd1: Model) -> None:
    plain, negative = (
        pixels(sample(sd1, None, ["a red star"], [1], replace(HOW, negative_prompt=text)))
        for text in ("", "a blue circle")
    )
    assert not np.array_equal(plain, negative)


def test_half_precision_beside_a_full_precision_autoencoder(sd1: Model) -> None:
    sd1.denoiser.net.to(torch.bfloat16)
    sd1.denoiser.pipeline.text_encoder.to(torch.bfloat16)
    sd1.encoder.model.to(torch.bfloat16)
    features = image_features(sd1, [[image(1)]])
    assert {f.dtype for f in features.values()} == {joined_tokens(sd1, features).tokens.dtype} == {torch.bfloat16}
    (drawn,) = sample(sd1, features, ["a red star"], [1], HOW)
    assert np.asarray(drawn).std() > 0


def test_tokens_of_several_images_stand_side_by_side(model: Model) -> None:
    shown = [[image(1), image(2)], [image(3), image(4)]]
    both = joined_tokens(model, image_features(model, shown)).tokens
    for place, prompt in enumerate(shown):
        apart = [joined_tokens(model, image_features(model, [[one]])).tokens for one in prompt]
        torch.testing.assert_close(both[place : place + 1], torch.cat(apart, 1))


def test_native_size_is_the_denoisers(some_model: Model) -> None:
    assert native_size_px(some_model) == (32, 32)


@pytest.mark.parametrize("attached", [False, True])
def test_a_stop_passes_through_and_leaves_the_model_as_found(sd1: Model, attached: bool) -> None:
    calls = 0

    def poll() -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise Stopped(130)

    if attached:
        sd1.attach()
    own, processors = sd1.denoiser.pipeline.scheduler, dict(sd1.denoiser.net.attn_processors)
    with pytest.raises(Stopped):
        sample(sd1, image_features(sd1, [[image(1)]]), ["a red star"], [1], HOW, poll)
    assert calls == 3 and sd1.is_attached == attached
    assert sd1.denoiser.pipeline.scheduler is own and sd1.denoiser.net.attn_processors == processors
    assert sd1.prompt.tokens is None and sd1.prompt.scale == 1.0
