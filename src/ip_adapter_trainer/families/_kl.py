"""The codec that all families with an `AutoencoderKL` share."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from ip_adapter_trainer.families._family import Codec

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class KLCodec(Codec):
    """A codec over a diffusers pipeline with a `vae`, and text encoders and tokenizers numbered from the second on."""

    def __init__(self, pipeline: Any) -> None:
        import torch

        self.pipeline = pipeline
        vae = pipeline.vae
        if vae is not None and vae.dtype != torch.float32:
            # One core with AMX, SD1.5, 256 px, bf16: an image is encoded in 0.69 s, with channels first in 1.62 s.
            vae.to(memory_format=torch.channels_last)

    @property
    def device(self) -> torch.device:
        """The device of the pipeline's parts."""
        return self.pipeline.device

    @property
    def autoencoder(self) -> Any:
        """See `Codec.autoencoder`."""
        return self.pipeline.vae

    def _named(self, beginning: str) -> list[Any]:
        names = [n for n in self.pipeline.components if n == beginning or n.startswith(f"{beginning}_")]
        return [part for name in sorted(names) if (part := self.pipeline.components[name]) is not None]

    @property
    def text_encoders(self) -> list[Any]:
        """See `Codec.text_encoders`."""
        return self._named("text_encoder")

    @property
    def tokenizers(self) -> list[Any]:
        """See `Codec.tokenizers`."""
        return self._named("tokenizer")

    def own_rules(self) -> list[Any]:
        """Return what else `encode` depends on, beside the tokenizers and encoders, as JSON values."""
        return []

    @property
    def text_rules(self) -> str:
        """See `Codec.text_rules`."""
        words = [(sorted(t.get_vocab().items()), t.model_max_length) for t in self.tokenizers]
        return json.dumps([words, *self.own_rules()])

    def latent_shape(self, height_px: int, width_px: int) -> tuple[int, int, int]:
        """See `Codec.latent_shape`."""
        config = self.pipeline.vae.config
        factor = 2 ** (len(config.block_out_channels) - 1)
        return int(config.latent_channels), height_px // factor, width_px // factor

    def moments(self, pixels: Tensor) -> Tensor:
        """See `Codec.moments`."""
        import torch

        from ip_adapter_trainer.nn.lean import lean_layers

        vae = self.pipeline.vae
        with torch.no_grad(), lean_layers(vae.encoder, products=False):
            moments: Tensor = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.parameters
        return moments

    def latents(self, moments: Tensor, noise: Tensor) -> Tensor:
        """See `Codec.latents`; normalised by `latents_mean` and `latents_std`, or shifted, where the VAE says so."""
        import torch
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

        from ip_adapter_trainer.core.values import to_device

        with torch.no_grad():
            posterior, config = DiagonalGaussianDistribution(moments.float()), self.pipeline.vae.config
            latents = posterior.mean + posterior.std * to_device(noise, moments.device)
            if getattr(config, "latents_mean", None) and getattr(config, "latents_std", None):
                stated = torch.tensor([config.latents_mean, config.latents_std], dtype=latents.dtype)
                mean, std = to_device(stated, latents.device).view(2, 1, -1, 1, 1)
                return (latents - mean) * config.scaling_factor / std
            shift = getattr(config, "shift_factor", None)
            return (latents if shift is None else latents - shift) * config.scaling_factor

    def release_encoder(self) -> None:
        """See `Codec.release_encoder`; the decoder stays."""
        self.pipeline.vae.encoder = self.pipeline.vae.quant_conv = None


def without_parts(kind: Any, loaded: dict[str, Any], said: dict[str, Any], absent: list[str]) -> Any:
    """Return a quiet diffusers pipeline of loaded components and other arguments, with None for absent components."""
    pipeline = kind(**{**said, **dict.fromkeys(absent), **loaded})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
