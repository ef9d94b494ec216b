"""The gates between the stages of the pocket build: what a stage must show the oracle before the next is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import CLIPModel

from ip_adapter_trainer.core.errors import Problem
from ip_adapter_trainer.core.rng import stream
from ip_adapter_trainer.pocket import models, oracle, world
from ip_adapter_trainer.pocket.world import ATTRIBUTES, Scene

AUTOENCODER_GATE, ENCODER_GATE, BASE_GATE = 0.99, 0.98, 0.95
BASE_CAPTIONS = 200
SAMPLER_STEPS, GUIDANCE = 30, 5.0


def demand(stage: str, scores: Mapping[str, float], gate: float) -> None:
    """Raise a Problem that names every score under the gate."""
    low = {name: score for name, score in scores.items() if score < gate}
    if low:
        shown = ", ".join(f"{name} {score:.3f}" for name, score in low.items())
        raise Problem(
            f"the {stage} does not pass its gate of {gate}: {shown}",
            remedy="raise the stage's steps in tools/pocket/train.py, or MAX_CYCLES in tools/pocket/build.py",
        )


def _scenes(seed: int, purpose: str, count: int, held: bool | None) -> list[Scene]:
    rng = stream(seed, purpose)
    return [world.random_scene(rng, held=held) for _ in range(count)]


def to_pixels(pictures: np.ndarray) -> Tensor:
    """Convert uint8 images [N, S, S, 3] to floats [N, 3, S, S] in -1..1."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_pictures(pixels: Tensor) -> np.ndarray:
    """Convert floats [N, 3, S, S] in -1..1 to uint8 images [N, S, S, 3]."""
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().permute(0, 2, 3, 1).numpy().astype(np.uint8)


@torch.no_grad()
def reconstruction(vae: AutoencoderKL, seed: int, count: int = 1000) -> dict[str, float]:
    """Return the fraction of each attribute that survives the autoencoder, on scenes of any combination."""
    scenes = _scenes(seed, "gate-autoencoder", count, held=None)
    pictures = np.stack([world.render(s) for s in scenes])
    decoded = [vae.decode(vae.encode(to_pixels(part)).latent_dist.mean).sample for part in np.array_split(pictures, 10)]
    return oracle.accuracy(to_pictures(torch.cat(decoded)), [s.attributes() for s in scenes])


@torch.no_grad()
def embed(clip: CLIPModel, pictures: np.ndarray) -> np.ndarray:
    """Return the image encoder's `image_embeds` [N, E] of uint8 images [N, S, S, 3]."""
    processor = models.image_processor()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (processor.image_mean, processor.image_std))
    parts = [
        ((to_pixels(part) + 1) / 2 - mean) / std for part in np.array_split(pictures, max(1, len(pictures) // 200))
    ]
    return torch.cat([clip.visual_projection(clip.vision_model(p).pooler_output) for p in parts]).numpy()


def probe(clip: CLIPModel, seed: int, train: int = 4000, test: int = 1000) -> dict[str, float]:
    """Return each attribute's accuracy of a ridge-regression probe on the image feature, on held-out combinations."""
    splits = [_scenes(seed, "gate-probe", train, held=False), _scenes(seed, "gate-probe-test", test, held=True)]
    features = [embed(clip, np.stack([world.render(s) for s in scenes])) for scenes in splits]
    mean, scale = features[0].mean(0), features[0].std(0) + 1e-6
    x, y = (np.hstack([(f - mean) / scale, np.ones((len(f), 1))]) for f in features)
    solve = np.linalg.solve(x.T @ x + 1e-2 * np.eye(x.shape[1]), x.T)
    scores = {}
    for name, values in ATTRIBUTES.items():
        codes = [np.array([values.index(getattr(s, name)) for s in scenes]) for scenes in splits]
        weights = solve @ np.eye(len(values))[codes[0]]
        scores[name] = float(((y @ weights).argmax(1) == codes[1]).mean())
    return scores


def unseen_captions(seed: int, count: int = BASE_CAPTIONS) -> list[Scene]:
    """Return held-out combinations, each once, in a seeded order."""
    held = [s for s in world.combinations() if world.held_out(s)]
    order = stream(seed, "gate-captions").permutation(len(held))
    return [held[i] for i in order[:count]]


def draw(
    pipeline: Any, captions: list[str], seed: int, steps: int = SAMPLER_STEPS, guidance: float = GUIDANCE
) -> np.ndarray:
    """Draw images uint8 [N, S, S, 3] by the base for captions, one initial noise a caption."""
    shape = (pipeline.unet.config.in_channels, models.LATENT_SIDE, models.LATENT_SIDE)
    noise = [stream(seed, "gate-noise", i).standard_normal(shape, dtype=np.float32) for i in range(len(captions))]
    pictures = []
    for part in np.array_split(np.arange(len(captions)), max(1, len(captions) // 50)):
        out = pipeline(
            [captions[i] for i in part], latents=torch.from_numpy(np.stack([noise[i] for i in part])),
            num_inference_steps=steps, guidance_scale=guidance, output_type="np",
        )  # fmt: skip
        pictures.append(np.rint(out.images * 255).astype(np.uint8))
    return np.concatenate(pictures)


def base_draws_text(pipeline: Any, seed: int, count: int = BASE_CAPTIONS) -> dict[str, float]:
    """Return the fraction of each attribute that the base draws as its caption says, on unseen combinations."""
    scenes = unseen_captions(seed, count)
    pictures = draw(pipeline, [world.caption(s) for s in scenes], seed)
    return oracle.accuracy(pictures, [s.attributes() for s in scenes])
