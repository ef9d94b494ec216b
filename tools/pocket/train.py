"""The trainings behind the pocket base: autoencoder, CLIP, its image tower alone, denoiser.

Each is a `Stage`: modules, a loss as a function of the step alone, and a number of steps. Step k draws everything from
counter streams keyed by (seed, stage, k), so a killed build goes on from its last save as if nothing had happened.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.training_utils import EMAModel, compute_snr
from torch import Tensor, nn
from transformers import CLIPModel

from ip_adapter_trainer.core.rng import stream
from ip_adapter_trainer.pocket import models, world
from ip_adapter_trainer.pocket.world import Scene

POOL_IMAGES = 20_000
DENOISER_SPREAD = 0.5  # of the poses that the encoders see: sharper pictures, learnt sooner
_SAVE_EVERY_S = 120.0


@dataclass
class Stage:
    """One training: `loss(step)` over `net`'s parameters for `steps` optimizer steps at peak rate `lr`.

    The rate follows a cosine over `horizon` steps (default: `steps`); a stage that needs only a part of it cools down
    linearly over its last `cooldown` steps.
    """

    name: str
    net: nn.Module
    loss: Callable[[int], Tensor]
    steps: int
    lr: float
    ema_decay: float | None = None
    horizon: int | None = None
    cooldown: int = 0


@dataclass(frozen=True)
class Pool:
    """The training pictures: scenes without held-out combinations, and their pixels [N, S, S, 3] uint8."""

    scenes: list[Scene]
    images: np.ndarray

    def pixels(self, index: np.ndarray) -> Tensor:
        """Return the chosen images as floats [B, 3, S, S] in -1..1."""
        return torch.from_numpy(self.images[index]).permute(0, 3, 1, 2).float() / 127.5 - 1


def make_pool(seed: int, spread: float = 1.0) -> Pool:
    """Render the training images; the same seed gives the same pool."""
    rng = stream(seed, "pocket-pool")
    scenes = [world.random_scene(rng, spread=spread) for _ in range(POOL_IMAGES)]
    return Pool(scenes, np.stack([world.render(s) for s in scenes]))


def total_steps(stage: Stage, cycles: int) -> int:
    """Return the steps of so many cycles: the first has `stage.steps`, each later one half as many."""
    return stage.steps + (cycles - 1) * (stage.steps // 2)


def rate(step: int, stage: Stage) -> float:
    """Return the learning rate: linear warm-up over 2 % of a cycle, a cosine to zero, a linear cool-down.

    A stage that misses its gate goes on with another cycle at half the rate, so its first one is the same however many
    follow.
    """
    length, horizon, peak = stage.steps, stage.horizon or stage.steps, stage.lr
    while step >= length:
        step, length, peak = step - length, stage.steps // 2, stage.lr / 2
        horizon = length
    warm = max(1, horizon // 50)
    if step < warm:
        return peak * (step + 1) / warm
    cool = min(1.0, (length - step) / stage.cooldown) if stage.cooldown else 1.0
    return peak * cool * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, horizon - warm)))


def run(stage: Stage, folder: Path, cycles: int, log: Callable[[str], None]) -> None:
    """Train a stage for some cycles, resuming from `folder`; leave the final (averaged) weights in `stage.net`."""
    end = total_steps(stage, cycles)
    state_file = folder / f"{stage.name}.state"
    optimizer = torch.optim.AdamW(stage.net.parameters(), lr=stage.lr, weight_decay=0.01, fused=True)
    ema = (
        EMAModel(stage.net.parameters(), decay=stage.ema_decay, use_ema_warmup=True, power=0.8)
        if stage.ema_decay
        else None
    )
    start, spent_s = _restore(state_file, stage, optimizer, ema)
    began = last_save = time.monotonic()
    running = 0.0
    for step in range(start, end):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, stage)
        loss = stage.loss(step)
        loss.backward()
        nn.utils.clip_grad_norm_(stage.net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if ema:
            ema.step(stage.net.parameters())
        running = loss.item() if step == start else 0.98 * running + 0.02 * loss.item()
        if (step + 1) % 100 == 0:
            total_s = spent_s + time.monotonic() - began
            log(f"{stage.name} {step + 1}/{end} loss {running:.5f} {total_s:.0f} s")
        if time.monotonic() - last_save > _SAVE_EVERY_S or step + 1 == end:
            last_save = time.monotonic()
            _save(state_file, stage, optimizer, ema, step + 1, spent_s + last_save - began)
    if ema:
        ema.copy_to(stage.net.parameters())


def _save(
    file: Path, stage: Stage, optimizer: torch.optim.Optimizer, ema: EMAModel | None, step: int, spent_s: float
) -> None:
    state = {"step": step, "spent_s": spent_s, "net": stage.net.state_dict(), "optimizer": optimizer.state_dict()}
    if ema:
        state["ema"] = ema.state_dict()
    torch.save(state, file.with_suffix(".tmp"))
    file.with_suffix(".tmp").replace(file)


def _restore(file: Path, stage: Stage, optimizer: torch.optim.Optimizer, ema: EMAModel | None) -> tuple[int, float]:
    if not file.exists():
        return 0, 0.0
    state = torch.load(file, weights_only=True, map_location="cpu")
    stage.net.load_state_dict(state["net"])
    optimizer.load_state_dict(state["optimizer"])
    if ema:
        ema.load_state_dict(state["ema"])
    return state["step"], state["spent_s"]


def autoencoder_stage(seed: int, pool: Pool, steps: int = 2600, batch: int = 24) -> Stage:
    """Return the stage of reconstruction (L1 + squared error) with a light KL, on random images of the pool."""
    torch.manual_seed(seed)
    net: AutoencoderKL = models.autoencoder()

    def loss(step: int) -> Tensor:
        """Of pictures [batch, 3, 32, 32] drawn for this step."""
        rng = stream(seed, "pocket-autoencoder", step)
        x = pool.pixels(rng.integers(len(pool.scenes), size=batch))
        posterior = net.encode(x).latent_dist
        noise = torch.from_numpy(rng.standard_normal(posterior.mean.shape, dtype=np.float32))
        y = net.decode(posterior.mean + posterior.std * noise).sample
        return F.l1_loss(y, x) + 2 * F.mse_loss(y, x) + 1e-5 * posterior.kl().mean()

    return Stage("autoencoder", net, loss, steps, lr=8e-4)


def _partial_caption(scene: Scene, rng: np.random.Generator, full: float) -> tuple[str, ...]:
    """Which attributes a training caption names: all of them with probability `full`, else a random subset."""
    if rng.random() < full:
        return tuple(world.ATTRIBUTES)
    return tuple(name for name in world.ATTRIBUTES if rng.random() < 0.5)


def _normalised(pixels: Tensor) -> Tensor:
    """Pixels [B, 3, S, S] in -1..1 as the image encoder wants them."""
    processor = models.image_processor()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (processor.image_mean, processor.image_std))
    return ((pixels + 1) / 2 - mean) / std


def _tokens(texts: list[str]) -> Tensor:
    """Padded token ids [B, MAX_TOKENS]."""
    ids: Tensor = models.tokenizer()(
        texts, padding="max_length", max_length=models.MAX_TOKENS, return_tensors="pt"
    ).input_ids
    return ids


def _contrast(logits: Tensor, match: Tensor) -> Tensor:
    """Symmetric cross-entropy of logits [texts, pictures] against uniform targets over all matching pairs."""
    by_text = -(match / match.sum(1, keepdim=True) * logits.log_softmax(1)).sum(1).mean()
    by_picture = -(match / match.sum(0, keepdim=True) * logits.log_softmax(0)).sum(0).mean()
    return (by_text + by_picture) / 2


def _codes(scenes: list[Scene]) -> np.ndarray:
    """Attribute values as integers, [N, 4]."""
    return np.array([[values.index(getattr(s, name)) for name, values in world.ATTRIBUTES.items()] for s in scenes])


def clip_stage(seed: int, pool: Pool, steps: int = 1500, batch: int = 128) -> Stage:
    """Return the stage of contrastive training of both towers; every image that fits a caption counts as its partner.

    Captions repeat in a small world, so the usual one-to-one targets would punish right answers.
    """
    torch.manual_seed(seed + 1)
    net: CLIPModel = models.clip()
    codes = _codes(pool.scenes)

    def loss(step: int) -> Tensor:
        """Of pictures and partial captions drawn for this step."""
        rng = stream(seed, "pocket-clip", step)
        index = rng.integers(len(pool.scenes), size=batch)
        named = [_partial_caption(pool.scenes[i], rng, full=0.7) for i in index]
        texts = [world.caption(pool.scenes[i], n) for i, n in zip(index, named, strict=True)]
        asked = np.array([[name in n for name in world.ATTRIBUTES] for n in named])  # [B, 4]
        differs = codes[index][:, None, :] != codes[index][None, :, :]  # [caption, picture, 4]
        match = torch.from_numpy(~(differs & asked[:, None, :]).any(-1)).float()
        out = net(input_ids=_tokens(texts), attention_mask=None, pixel_values=_normalised(pool.pixels(index)))
        return _contrast(out.logits_per_text, match)

    return Stage("clip", net, loss, steps, lr=1e-3)


def vision_stage(seed: int, clip: CLIPModel, steps: int = 2000, groups: int = 22) -> Stage:
    """Return the stage in which the image tower trains alone against the locked text tower, on hard batches.

    This is LiT (arXiv 2111.07991). A batch holds groups of images that differ in nothing named but the shape, the
    attribute that a small ViT learns last; among random images colour alone tells most pairs apart. Every image is new.
    """
    clip.text_model.requires_grad_(False)
    clip.text_projection.requires_grad_(False)

    def loss(step: int) -> Tensor:
        """Of pictures rendered for this step, in groups that differ in the shape only."""
        rng = stream(seed, "pocket-vision", step)
        rests = {(s.colour, s.pattern, s.background) for s in (world.random_scene(rng) for _ in range(groups))}
        scenes = [Scene(shape, *rest) for rest in sorted(rests) for shape in world.SHAPES]
        scenes = [world.random_pose(scene, rng) for scene in scenes if not world.held_out(scene)]
        pixels = Pool(scenes, np.stack([world.render(scene) for scene in scenes])).pixels(np.arange(len(scenes)))
        texts = [world.caption(scene) for scene in scenes]
        out = clip(input_ids=_tokens(texts), attention_mask=None, pixel_values=_normalised(pixels))
        return _contrast(out.logits_per_text, torch.eye(len(scenes)))

    return Stage("vision", clip, loss, steps, lr=6e-4)


@torch.no_grad()
def encode_pool(vae: AutoencoderKL, pool: Pool) -> tuple[Tensor, Tensor]:
    """Return posterior mean and standard deviation of every image, each [N, 4, h, w], unscaled."""
    parts = [vae.encode(pool.pixels(i)).latent_dist for i in np.array_split(np.arange(len(pool.scenes)), 200)]
    return torch.cat([p.mean for p in parts]), torch.cat([p.std for p in parts])


def fix_scaling_factor(vae: AutoencoderKL, pool: Pool) -> None:
    """Set `scaling_factor` so that sampled latents of the pool have unit deviation, as latent diffusion assumes."""
    mean, std = encode_pool(vae, Pool(pool.scenes[:4000], pool.images[:4000]))
    vae.register_to_config(scaling_factor=round(float((mean.var() + std.square().mean()).rsqrt()), 4))


@torch.no_grad()
def encode_texts(clip: CLIPModel, texts: list[str]) -> Tensor:
    """Return the text encoder's last hidden states [B, MAX_TOKENS, TEXT_WIDTH], as the pipeline computes them."""
    hidden: Tensor = clip.text_model(input_ids=_tokens(texts)).last_hidden_state
    return hidden


def denoiser_stage(
    seed: int, pool: Pool, vae: AutoencoderKL, clip: CLIPModel, steps: int = 3500, batch: int = 48
) -> Stage:
    """Return the stage of noise prediction with min-SNR weights (gamma 5, 2303.09556) over cached latents and texts.

    Captions name all attributes six times in ten, a random subset otherwise, nothing now and then, so that "a star"
    and the empty prompt are ordinary inputs. Three timesteps in four come from the upper 70 %, where shapes are
    decided; the rest is detail, and soon learnt.
    """
    torch.manual_seed(seed + 2)
    net: UNet2DConditionModel = models.unet()
    noise_process = models.scheduler()
    mean, std = encode_pool(vae, pool)
    cache: dict[str, Tensor] = {}

    def text(index: int, rng: np.random.Generator) -> Tensor:
        """Encoding of a caption of a scene, partial or empty by chance, [L, D]."""
        scene = pool.scenes[index]
        caption = "" if rng.random() < 0.07 else world.caption(scene, _partial_caption(scene, rng, full=0.6))
        if caption not in cache:
            cache[caption] = encode_texts(clip, [caption])[0]
        return cache[caption]

    def loss(step: int) -> Tensor:
        """Weighted noise error of latents [batch, 4, 8, 8] at timesteps drawn for this step."""
        rng = stream(seed, "pocket-denoiser", step)
        index = rng.integers(len(pool.scenes), size=batch)
        normal = [torch.from_numpy(rng.standard_normal((batch, *mean.shape[1:]), dtype=np.float32)) for _ in range(2)]
        latents = (mean[index] + std[index] * normal[0]) * vae.config.scaling_factor
        t = torch.from_numpy(
            np.where(rng.random(batch) < 0.75, rng.integers(300, 1000, batch), rng.integers(300, size=batch))
        )
        noisy = noise_process.add_noise(latents, normal[1], t)
        context = torch.stack([text(int(i), rng) for i in index])
        error = (net(noisy, t, context).sample - normal[1]).square().mean((1, 2, 3))
        snr = compute_snr(noise_process, t)
        return (error * snr.clamp(max=5.0) / snr).mean()

    return Stage("denoiser", net, loss, steps, lr=1e-3, ema_decay=0.999, horizon=6000, cooldown=1500)
