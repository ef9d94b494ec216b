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
    image_tokens,
    initial_latents,
    native_size_px,
    null_tokens,
    sample,
)
from ip_adapter_trainer.model import Model
from tests.evaluate.things import image

HOW = Sampling(height_px=32, width_px=32, steps=3, scheduler="auto")
PROMPTS, SEEDS = ["a red star", "a blue circle"], [11, 12]


def pixels(pictures: Sequence[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(p, np.int16) for p in pictures])


def run_pipeline(model: Model, prompts: list[str], seeds: list[int], how: Sampling, **image: Any) -> np.ndarray:
    """The base pipeline as a user would call it."""
    latents = initial_latents(model, seeds, how.height_px, how.width_px)
    drawn = model.family.pipeline(
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
    model.family.pipeline.register_modules(image_encoder=model.encoder.model, feature_extractor=extractor)
    model.family.pipeline.load_ip_adapter(str(folder), subfolder="", weight_name="ip_adapter.bin")


def test_draws_what_diffusers_draws_from_the_same_weights(model: Model, tmp_path: Path) -> None:
    strengthen(model)
    one, two = image(1), image(2)
    prompts = {"one": ([[one]], one), "both": ([[one, two]], [[one, two]])}  # ours, diffusers'
    guided = replace(HOW, guidance_scale=4.0, scale=0.8)
    ways = {"guided": guided, "unguided": replace(guided, guidance_scale=1.0)}
    ours = {
        (way, name): pixels(sample(model, image_tokens(model, image), PROMPTS, SEEDS, how))
        for way, how in ways.items()
        for name, (image, _) in prompts.items()
    }
    load_into_diffusers(model, tmp_path)
    model.family.pipeline.set_ip_adapter_scale(0.8)
    for (way, name), drawn in ours.items():
        theirs = run_pipeline(model, PROMPTS, SEEDS, ways[way], ip_adapter_image=prompts[name][1])
        assert abs(drawn - theirs).max() <= 1, (way, name)
    assert abs(ours["guided", "one"] - ours["guided", "both"]).max() > 8, "the pictures tell prompts apart"


def test_scale_zero_and_no_tokens_are_the_base_pipeline_bit_for_bit(model: Model) -> None:
    base = run_pipeline(model, PROMPTS, SEEDS, HOW)
    tokens = image_tokens(model, [[image(1)], [image(2)]])
    assert np.array_equal(pixels(sample(model, tokens, PROMPTS, SEEDS, replace(HOW, scale=0.0))), base)
    assert np.array_equal(pixels(sample(model, None, PROMPTS, SEEDS, HOW)), base)
    assert np.array_equal(run_pipeline(model, PROMPTS, SEEDS, HOW), base), "the pipeline is what it was"


def test_a_picture_hangs_on_its_own_seed_and_prompt_alone(sd1: Model) -> None:
    strengthen(sd1)
    tokens = image_tokens(sd1, [[image(n)] for n in range(3)])
    prompts = ["a red star", "", "a pink heart"]
    together = pixels(sample(sd1, tokens, prompts, [5, 6, 7], HOW))
    alone = pixels(sample(sd1, tokens[2:], prompts[2:], [7], HOW))
    in_parts = pixels(sample(sd1, tokens, prompts, [5, 6, 7], replace(HOW, batch_images=1)))
    assert abs(together[2:] - alone).max() <= 1 and abs(together - in_parts).max() <= 1
    assert abs(together[2:] - pixels(sample(sd1, tokens[2:], prompts[2:], [8], HOW))).max() > 8


@pytest.mark.parametrize("scheduler", ["ddim", "euler", "dpm++"])
def test_every_scheduler_draws_and_the_pipelines_own_is_untouched(sd1: Model, scheduler: Any) -> None:
    own = sd1.family.pipeline.scheduler
    own.set_timesteps(7)
    config, timesteps = dict(sd1.family.pipeline.config), own.timesteps.clone()
    (drawn,) = sample(sd1, None, ["a red star"], [1], replace(HOW, scheduler=scheduler))
    assert drawn.size == (32, 32)
    assert sd1.family.pipeline.scheduler is own and torch.equal(own.timesteps, timesteps)
    assert dict(sd1.family.pipeline.config) == config


def test_the_negative_prompt_counts(sd1: Model) -> None:
    plain, negative = (
        pixels(sample(sd1, None, ["a red star"], [1], replace(HOW, negative_prompt=text)))
        for text in ("", "a blue circle")
    )
    assert not np.array_equal(plain, negative)


def test_half_precision_beside_a_full_precision_autoencoder(sd1: Model) -> None:
    sd1.family.denoiser.to(torch.bfloat16)
    sd1.family.pipeline.text_encoder.to(torch.bfloat16)
    sd1.encoder.model.to(torch.bfloat16)
    tokens = image_tokens(sd1, [[image(1)]])
    assert tokens.dtype == torch.bfloat16
    (drawn,) = sample(sd1, tokens, ["a red star"], [1], HOW)
    assert np.asarray(drawn).std() > 0


def test_no_picture_is_repeated_to_the_length_of_several(sd1: Model) -> None:
    one = null_tokens(sd1, sd1.num_tokens)
    assert torch.equal(null_tokens(sd1, 3 * sd1.num_tokens), torch.cat([one] * 3, 1))


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
    own, processors = sd1.family.pipeline.scheduler, sd1.family.processors()
    with pytest.raises(Stopped):
        sample(sd1, image_tokens(sd1, [[image(1)]]), ["a red star"], [1], HOW, poll)
    assert calls == 3 and sd1.is_attached == attached
    assert sd1.family.pipeline.scheduler is own and sd1.family.processors() == processors
    assert sd1.prompt.tokens is None and sd1.prompt.scale == 1.0
