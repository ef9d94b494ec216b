"""Pictures from a base model with the adapter attached, by the base model's own diffusers pipeline."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from inspect import signature
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ip_adapter_trainer.core.errors import Problem
from ip_adapter_trainer.core.rng import key, stream
from ip_adapter_trainer.core.values import ImageTokens
from ip_adapter_trainer.evaluate.config import Scheduler
from ip_adapter_trainer.model import Features, Model
from ip_adapter_trainer.runtime.stopping import Poll, no_poll

if TYPE_CHECKING:
    from PIL.Image import Image

_SCHEDULERS = {"ddim": "DDIMScheduler", "euler": "EulerDiscreteScheduler", "dpm++": "DPMSolverMultistepScheduler"}


@dataclass(frozen=True)
class Sampling:
    """Settings of a drawing; the defaults are the paper's (section 4.1.3: 50 steps of DDIM, guidance 7.5)."""

    height_px: int
    width_px: int
    steps: int = 50
    guidance_scale: float = 7.5  # at most 1: without classifier-free guidance
    scale: float = 1.0  # weight of the image prompt; 0 is the base model's own picture, bit for bit
    scheduler: Scheduler = "ddim"
    negative_prompt: str = ""
    batch_images: int = 8


def native_size_px(model: Model) -> tuple[int, int]:
    """Return the height and width that the base model was made for."""
    config: Any = model.denoiser.net.config
    side = config.sample_size
    height, width = (side, side) if isinstance(side, int) else side
    _, rows, columns = model.codec.latent_shape(1024, 1024)
    return height * 1024 // rows, width * 1024 // columns


@torch.no_grad()
def image_features(model: Model, references: Sequence[Sequence[Image]]) -> Features:
    """Return features [P, n, ...] of P image prompts of n RGB images each."""
    assert len({len(images) for images in references}) == 1, "as many images in every prompt"
    every = [image for images in references for image in images]
    pixels = {role: torch.stack([encoder.preprocess(i) for i in every]) for role, encoder in model.encoders.items()}
    return grouped(model.features(pixels), len(references))


def grouped(features: Features, prompts: int) -> Features:
    """Return features [P n, ...] as those of P prompts, [P, n, ...]."""
    return {need: feature.unflatten(0, (prompts, -1)) for need, feature in features.items()}


def select(features: Features, part: Any) -> Features:
    """Return the features of some prompts: each tensor at an index of its first dimension."""
    return {need: feature[part] for need, feature in features.items()}


@torch.no_grad()
def joined_tokens(model: Model, features: Features) -> ImageTokens:
    """Return tokens [P, n N, D] of P prompts' features [P, n, ...].

    The tokens of one prompt's images stand side by side in one attention, as diffusers does with a list of images for
    one adapter.
    """
    prompts, count = next(iter(features.values())).shape[:2]
    flat = {need: feature.flatten(0, 1) for need, feature in features.items()}
    found = model.project(flat, torch.zeros(prompts * count, device=model.denoiser.device))
    return ImageTokens(found.tokens.reshape(prompts, -1, found.tokens.shape[-1]), found.time_embedding)


def initial_latents(model: Model, seeds: Sequence[int], height_px: int, width_px: int) -> Tensor:
    """Return unit normal latents [P, C, h, w]; each picture's from its own seed, so on every device the same."""
    shape = model.codec.latent_shape(height_px, width_px)
    noise = np.stack([stream(seed, "sample").standard_normal(shape, dtype=np.float32) for seed in seeds])
    return torch.from_numpy(noise).to(model.denoiser.device, model.dtype)


def sample(
    model: Model,
    features: Features | None,
    prompts: Sequence[str],
    seeds: Sequence[int],
    how: Sampling,
    poll: Poll = no_poll,
) -> list[Image]:
    """Draw one image for each of P prompts; the model is given back as it was found, attached or not.

    Args:
        model: its pipeline draws.
        features: image prompts [Q, n, ...] from `image_features`, each for P / Q prompts in a row; None: the base
            model.
        prompts: P text prompts.
        seeds: P seeds, of which each decides its own image's noise and nothing else.
        how: size, steps, guidance, scale.
        poll: called before the first step and after every one.
    """
    assert len(prompts) == len(seeds)
    images: list[Image] = []
    with evaluation_mode(model), _scheduler(model.denoiser.pipeline, how.scheduler):
        shown = None if features is None else _Shown.of(model, features, len(prompts))
        for start in range(0, len(prompts), how.batch_images):
            part = slice(start, start + how.batch_images)
            poll()
            images += _draw(model, shown and shown.part(part), prompts[part], seeds[part], how, poll)
    return images


@dataclass(frozen=True)
class _Shown:
    """Image prompts, and the tokens that are made of them once."""

    features: Features  # [P, n, ...]
    tokens: Tensor  # [P, M, D]
    none: Tensor  # [1, M, D], of as many times "no image"

    @classmethod
    def of(cls, model: Model, features: Features, prompts: int) -> _Shown:
        """Spread image prompts [Q, n, ...] over so many prompts."""
        count, images = next(iter(features.values())).shape[:2]
        own = joined_tokens(model, features).tokens
        nulls = {need: null[:, None] for need, null in model.null(1).items()}  # [1, 1, ...]
        none = joined_tokens(model, nulls).tokens.repeat(1, images, 1)
        each = prompts // count
        spread = {need: feature.repeat_interleave(each, 0) for need, feature in features.items()}
        return cls(spread, own.repeat_interleave(each, 0), none)

    def part(self, part: slice) -> _Shown:
        """Return those of some prompts."""
        return _Shown(select(self.features, part), self.tokens[part], self.none)


def _show(model: Model, shown: _Shown, how: Sampling, is_guided: bool) -> None:
    """Let the adapted layers see image prompts; a guided pipeline runs "no image" first, in one batch."""
    if not model.variant.reads_time:
        own, none = shown.tokens, shown.none.expand_as(shown.tokens)
        model.show(ImageTokens(torch.cat([none, own]) if is_guided else own), how.scale)
        return
    nulls = {need: null[:, None] for need, null in model.null(1).items()}
    given = {
        need: torch.cat([nulls[need].to(feature.dtype).expand_as(feature), feature]) if is_guided else feature
        for need, feature in shown.features.items()
    }
    model.show_features({need: feature.flatten(0, 1) for need, feature in given.items()}, how.scale)


def _draw(
    model: Model, shown: _Shown | None, prompts: Sequence[str], seeds: Sequence[int], how: Sampling, poll: Poll
) -> list[Image]:
    """One call of the pipeline."""

    def after_step(pipeline: Any, step: int, timestep: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Let a stop come between steps; diffusers calls this after each."""
        poll()
        last = step == pipeline.num_timesteps - 1
        # A VAE kept in fp32 beside a half precision denoiser cannot decode half precision latents.
        return {"latents": state["latents"].to(pipeline.vae.dtype)} if last else {}

    distilled = getattr(model.denoiser.net.config, "time_cond_proj_dim", None) is not None
    is_guided = how.guidance_scale > 1 and not distilled  # by a pass without prompts beside the one with them
    with model.codec.awake():
        positive = model.codec.prompts(list(prompts))
        negative = model.codec.encode([how.negative_prompt] * len(prompts)) if is_guided else None
    if shown is None:
        model.show(None)
    else:
        _show(model, shown, how, is_guided)
        if how.scale:
            positive = model.layout.condition(positive, shown.tokens)
            negative = negative and model.layout.condition(negative, shown.none.expand_as(shown.tokens))
    takes = signature(type(model.denoiser.pipeline).__call__).parameters
    watched = {"callback_on_step_end": after_step} if "callback_on_step_end" in takes else {}
    steps = [torch.Generator().manual_seed(key(seed, "sample-steps") % 2**63) for seed in seeds]
    output = model.denoiser.pipeline(
        **model.denoiser.sampling(positive, negative),
        height=how.height_px,
        width=how.width_px,
        num_inference_steps=how.steps,
        guidance_scale=how.guidance_scale,
        latents=initial_latents(model, seeds, how.height_px, how.width_px),
        generator=steps,
        **watched,
    )
    images: list[Image] = output.images
    return images


@contextmanager
def evaluation_mode(model: Model) -> Iterator[None]:
    """Attach the adapter in evaluation mode, without gradients; leave all as it was found, whatever is raised."""
    was_training, seen = model.adapter.training, dict(vars(model.prompt))
    model.adapter.eval()
    try:
        # Not inference_mode: the encoder keeps its null feature, and training needs that one afterwards.
        with nullcontext() if model.is_attached else model.attached(), torch.no_grad():
            yield
    finally:
        model.adapter.train(was_training)
        vars(model.prompt).update(seen)


@contextmanager
def _scheduler(pipeline: Any, name: Scheduler) -> Iterator[None]:
    """A fresh scheduler for a while, made from the config of the pipeline's own one, which stays untouched."""
    import diffusers

    own = pipeline.scheduler
    kind = type(own) if name == "auto" else getattr(diffusers, _SCHEDULERS[name])
    if own.config.get("rescale_betas_zero_snr") and "rescale_betas_zero_snr" not in signature(kind.__init__).parameters:
        what = f"the base model's own {kind.__name__} cannot draw down to a terminal SNR of zero"
        raise Problem(what, where="--scheduler", remedy="take --scheduler ddim, euler or dpm++")
    pipeline.scheduler = kind.from_config(own.config)
    try:
        yield
    finally:
        pipeline.scheduler = own
