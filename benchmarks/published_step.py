"""The published recipe's training step, written from its description: what it computes, and in which order.

Every frozen net runs at every step. With mixed precision the encoders are cast and the UNet stays in fp32 under
autocast. Text and image tokens travel concatenated, so gradients of the text's keys and values are computed and thrown
away; each adapted layer computes an attention map that nobody reads; the loss is fetched to the host between forward
and backward; a save writes the UNet as well as the adapter, and the optimizer's moments.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import save
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor, nn

from benchmarks.rows import Draws, draw
from benchmarks.sizes import TOKENS, Nets
from ip_adapter_trainer.core.values import Batch, Pixels
from ip_adapter_trainer.diffusion import NoiseProcess, ObjectiveConfig
from ip_adapter_trainer.runtime.precision import dtype_of


class ImageProjection(nn.Module):
    """One linear layer to all tokens, then a norm."""

    def __init__(self, feature_dim: int, context_dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(feature_dim, TOKENS * context_dim)
        self.norm = nn.LayerNorm(context_dim)

    def forward(self, features: Tensor) -> Tensor:
        """[B, E] to [B, N, D]."""
        return self.norm(self.proj(features).reshape(len(features), TOKENS, -1))


class SelfAttention(nn.Module):
    """A processor without weights, which still has a place in the numbering."""

    def forward(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Replaces a self-attention layer by the same."""
        return AttnProcessor2_0()(attn, hidden_states, *args, **kwargs)


class TextAndImageAttention(nn.Module):
    """A cross-attention processor that owns its pair and cuts the image tokens off the end of the context."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        width, context_dim = layer.to_k.weight.shape
        self.to_k_ip = nn.Linear(context_dim, width, bias=False)
        self.to_v_ip = nn.Linear(context_dim, width, bias=False)
        self.to_k_ip.weight.data.copy_(layer.to_k.weight)
        self.to_v_ip.weight.data.copy_(layer.to_v.weight)
        self.attn_map: Tensor | None = None

    def forward(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any) -> Tensor:
        """Replaces a cross-attention layer [B, L, C] -> [B, L, C]."""
        text, image = encoder_hidden_states[:, :-TOKENS], encoder_hidden_states[:, -TOKENS:]

        def split(x: Tensor) -> Tensor:  # [B, L, C] to [B, heads, L, C / heads]
            return x.reshape(len(x), -1, attn.heads, x.shape[-1] // attn.heads).transpose(1, 2)

        query = split(attn.to_q(hidden_states))
        out = F.scaled_dot_product_attention(query, split(attn.to_k(text)), split(attn.to_v(text)))
        key, value = split(self.to_k_ip(image)), split(self.to_v_ip(image))
        out = out + F.scaled_dot_product_attention(query, key, value)
        with torch.no_grad():
            self.attn_map = query @ key.transpose(-2, -1).softmax(dim=-1)
        out = out.transpose(1, 2).reshape(hidden_states.shape).to(query.dtype)
        return attn.to_out[1](attn.to_out[0](out))


class PublishedModel(nn.Module):
    """UNet, projector and processors in one module; its saved keys are the published ones."""

    def __init__(self, unet: Any, projector: ImageProjection) -> None:
        super().__init__()
        self.unet, self.image_proj_model = unet, projector
        layers = {name: unet.get_submodule(name.removesuffix(".processor")) for name in unet.attn_processors}
        crossing = {name: name.endswith("attn2.processor") for name in layers}
        unet.set_attn_processor(
            {
                name: TextAndImageAttention(layer) if crossing[name] else SelfAttention()
                for name, layer in layers.items()
            }
        )
        self.adapter_modules = nn.ModuleList(unet.attn_processors.values())

    def forward(self, noisy: Tensor, timesteps: Tensor, text: Tensor, features: Tensor, added: Any) -> Tensor:
        """The UNet's prediction [B, C, h, w] with text [B, L, D] and image features [B, E]."""
        context = torch.cat([text, self.image_proj_model(features)], dim=1)
        return self.unet(noisy, timesteps, context, added_cond_kwargs=added).sample

    def trained(self) -> dict[str, nn.Parameter]:
        """What is optimised, by its published training key."""
        parts = {"image_proj_model": self.image_proj_model, "adapter_modules": self.adapter_modules}
        return {f"{part}.{name}": p for part, module in parts.items() for name, p in module.named_parameters()}


class PublishedStep:
    """The published script's frozen nets, model and optimizer; `precision` as its `--mixed_precision`.

    Attributes:
        saves: the step under way is followed by a save.
        is_writing: a save goes on beside the steps.
    """

    saves = is_writing = False

    def __init__(self, nets: Nets, weights: dict[str, Tensor], precision: str, device: torch.device) -> None:
        self.device, self.dtype = device, dtype_of(precision)
        self.pipeline, self.image_encoder = nets.pipeline, nets.image_encoder.to(self.dtype)
        self.is_xl = hasattr(self.pipeline, "text_encoder_2")
        self.texts = [self.pipeline.text_encoder, *([self.pipeline.text_encoder_2] if self.is_xl else [])]
        for net in (*self.texts, *([] if self.is_xl else [self.pipeline.vae])):  # SDXL's VAE stays in fp32
            net.to(self.dtype)
        context_dim, feature_dim = len(weights["norm.weight"]), weights["proj.weight"].shape[1]
        with torch.device(device):
            projector = ImageProjection(feature_dim, context_dim)
            self.model = PublishedModel(self.pipeline.unet, projector)
        projector.load_state_dict(weights)
        self.process = NoiseProcess(self.pipeline.scheduler, ObjectiveConfig(timestep_density="uniform"))
        self.optimizer = torch.optim.AdamW(self.model.trained().values(), lr=1e-4, weight_decay=1e-2)
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")

    @torch.no_grad()
    def encode(self, batch: Batch) -> tuple[Any, Tensor]:
        """The latents' posterior and image features [B, E]; dropped pictures are encoded first and zeroed after."""
        assert isinstance(batch.inputs, Pixels)
        vae = self.pipeline.vae
        posterior = vae.encode(batch.inputs.pixels.to(vae.dtype)).latent_dist
        features = self.image_encoder(batch.inputs.prompts["image"].to(self.dtype)).image_embeds
        kept = [torch.zeros_like(f) if drop else f for f, drop in zip(features, batch.drop_image.tolist(), strict=True)]
        return posterior, torch.stack(kept)

    @torch.no_grad()
    def encode_text(self, batch: Batch) -> tuple[Tensor, Any]:
        """Text states [B, L, D]; for SDXL those of two encoders side by side, with pooled states and sizes."""
        padded = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        ids = self.pipeline.tokenizer(list(batch.text), **padded).input_ids.to(self.device)
        if not self.is_xl:
            return self.texts[0](ids)[0], None
        states = [encoder(ids, output_hidden_states=True) for encoder in self.texts]
        sizes = [[*g.original_px, *g.crop_px, *g.target_px] for g in batch.geometry]
        time_ids = torch.tensor(sizes, dtype=self.dtype, device=self.device)
        context = torch.cat([s.hidden_states[-2] for s in states], dim=-1)
        return context, {"text_embeds": states[1][0], "time_ids": time_ids}

    def draws(self, batch: Batch) -> Draws:
        """The chance of a step; given to both sides alike."""
        assert isinstance(batch.inputs, Pixels)
        shape = batch.inputs.pixels.shape[-2:]
        factor = self.pipeline.vae_scale_factor
        drawn = draw(self.process, batch, (4, shape[0] // factor, shape[1] // factor))
        return Draws(*(t.to(self.device) for t in (drawn.posterior, drawn.noise, drawn.timesteps)))

    def loss(self, batch: Batch, draws: Draws) -> Tensor:
        """Everything encoded, then the squared error of the noise, a scalar."""
        posterior, features = self.encode(batch)
        latents = posterior.mean + posterior.std * draws.posterior.to(posterior.mean)
        latents = (latents * self.pipeline.vae.config.scaling_factor).to(self.dtype)
        noise = draws.noise.to(self.dtype)
        noisy = self.process.scheduler.add_noise(latents, noise, draws.timesteps)
        text, added = self.encode_text(batch)
        with self._mixed():
            prediction = self.model(noisy, draws.timesteps, text, features, added)
        return F.mse_loss(prediction.float(), noise.float(), reduction="mean")

    def _mixed(self) -> AbstractContextManager[object]:
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def step(self, batch: Batch, draws: Draws) -> float:
        """One optimizer step; returns the loss, fetched before the backward pass."""
        loss = self.loss(batch, draws)
        average = loss.repeat(len(batch)).mean().item()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return average

    def gradients(self, batch: Batch) -> dict[str, Tensor]:
        """Gradients of the trained weights for a batch, by published training key; nothing is stepped."""
        self.loss(batch, self.draws(batch)).backward()
        found = {name: p.grad.float() for name, p in self.model.trained().items() if p.grad is not None}
        self.optimizer.zero_grad()
        return found

    def try_step(self, batch: Batch) -> None:
        """A whole step, to see whether it fits."""
        self.step(batch, self.draws(batch))

    def run(self, batches: Iterator[Batch], images: int, output: Path) -> Path:
        """Trains until there are no more batches and saves when told to; returns the folder of the saves."""
        for batch in batches:
            self.step(batch, self.draws(batch))
            if self.saves:
                self.save(output)
        return output

    def save(self, folder: Path) -> None:
        """What the script saves: the whole model and the optimizer's state."""
        folder.mkdir(parents=True, exist_ok=True)
        save(self.model.state_dict(), str(folder / "model.safetensors"), safe_serialization=True)
        torch.save(self.optimizer.state_dict(), folder / "optimizer.bin")
