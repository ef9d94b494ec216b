"""Pictures from a base model with the adapter attached, by the base model's own diffusers pipeline."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ip_adapter_trainer.core.errors import Problem
from ip_adapter_trainer.core.rng import key, stream
from ip_adapter_trainer.evaluate.config import Scheduler
from ip_adapter_trainer.evaluate.mode import evaluation_mode
from ip_adapter_trainer.model import Model
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
    config: Any = model.family.denoiser.config
    side = config.sample_size
    height, width = (side, side) if isinstance(side, int) else side
    _, rows, columns = model.family.latent_shape(1024, 1024)
    return height * 1024 // rows, width * 1024 // columns


@torch.no_grad()
def image_tokens(model: Model, references: Sequence[Sequence[Image]]) -> Tensor:
    """Return tokens [P, n * N, D] of P image prompts of n RGB images each.

    The tokens of one prompt's images stand side by side in one attention, as diffusers does with a list of images for
    one adapter.
    """
    assert len({len(pictures) for pictures in references}) == 1, "as many pictures in every prompt"
    tokens = tokens_of(
        model, torch.stack([model.encoder.preprocess(image) for pictures in references for image in pictures])
    )
    return tokens.reshape(len(references), -1, tokens.shape[-1])


@torch.no_grad()
def tokens_of(model: Model, pixels: Tensor, features: Tensor | None = None) -> Tensor:
    """Return tokens [B, N, D] of preprocessed pixels [B, 3, S, S], or of their features if they are given."""
    return model.project(model.features(pixels) if features is None else features)


@torch.no_grad()
def null_tokens(model: Model, length: int) -> Tensor:
    """Return tokens [1, length, D] of "no image", repeated to the length of the tokens that they stand against."""
    tokens = model.project(model.encoder.null(model.variant.feature))
    return tokens.repeat(1, length // tokens.shape[1], 1)


def initial_latents(model: Model, seeds: Sequence[int], height_px: int, width_px: int) -> Tensor:
    """Draw unit normal latents [P, C, h, w], each image's from its own seed, so on every device the same."""
    shape = model.family.latent_shape(height_px, width_px)
    noise = np.stack([stream(seed, "sample").standard_normal(shape, dtype=np.float32) for seed in seeds])
    return torch.from_numpy(noise).to(model.family.device, model.dtype)


def sample(
    model: Model,
    tokens: Tensor | None,
    prompts: Sequence[str],
    seeds: Sequence[int],
    how: Sampling,
    poll: Poll = no_poll,
) -> list[Image]:
    """Draw one image for each of P prompts.

    Args:
        model: attached or not; it is given back as it was found, its pipeline's scheduler too.
        tokens: image prompts [P, M, D] from `image_tokens`, or [1, M, D] for all; None: the base model.
        prompts: P text prompts.
        seeds: P seeds, of which each decides its own image's noise and nothing else.
        how: size, steps, guidance, scale.
        poll: called before the first step and after every one.
    """
    assert len(prompts) == len(seeds)
    if tokens is not None:
        tokens = tokens.expand(len(prompts), -1, -1)
    pictures: list[Image] = []
    with evaluation_mode(model), _scheduler(model.family.pipeline, how.scheduler):
        model.prompt.scale = how.scale
        for start in range(0, len(prompts), how.batch_images):
            part = slice(start, start + how.batch_images)
            poll()
            model.prompt.tokens = None if tokens is None else _guided(model, tokens[part], how)
            pictures += _draw(model, prompts[part], seeds[part], how, poll)
    return pictures


def _is_guided(model: Model, how: Sampling) -> bool:
    """Return whether the pipeline runs a pass without prompts beside the one with them."""
    distilled = getattr(model.family.denoiser.config, "time_cond_proj_dim", None) is not None
    return how.guidance_scale > 1 and not distilled


def _guided(model: Model, tokens: Tensor, how: Sampling) -> Tensor:
    """The tokens [P or 2P, M, D] of one forward pass: a guided pipeline runs "no picture" first, in the same batch."""
    if not _is_guided(model, how):
        return tokens
    return torch.cat([null_tokens(model, tokens.shape[1]).expand_as(tokens), tokens])


def _draw(model: Model, prompts: Sequence[str], seeds: Sequence[int], how: Sampling, poll: Poll) -> list[Image]:
    """One call of the pipeline."""

    def after_step(pipeline: Any, step: int, timestep: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Let a stop come between steps; diffusers calls this after each."""
        poll()
        last = step == pipeline.num_timesteps - 1
        # A VAE kept in fp32 beside a half precision denoiser cannot decode half precision latents.
        return {"latents": state["latents"].to(pipeline.vae.dtype)} if last else {}

    steps = [torch.Generator().manual_seed(key(seed, "sample-steps") % 2**63) for seed in seeds]
    output = model.family.pipeline(
        **model.family.embedded_prompts(prompts, how.negative_prompt, guided=_is_guided(model, how)),
        height=how.height_px,
        width=how.width_px,
        num_inference_steps=how.steps,
        guidance_scale=how.guidance_scale,
        latents=initial_latents(model, seeds, how.height_px, how.width_px),
        generator=steps,
        callback_on_step_end=after_step,
    )
    pictures: list[Image] = output.images
    return pictures


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
