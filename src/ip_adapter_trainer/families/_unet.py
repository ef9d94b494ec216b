"""What all families with a `UNet2DConditionModel` share: sites, their numbering, latents, prediction."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from ip_adapter_trainer.core.devices import to_device
from ip_adapter_trainer.core.errors import Problem
from ip_adapter_trainer.core.settings import Part
from ip_adapter_trainer.core.values import Site, TextCondition
from ip_adapter_trainer.families._family import Family
from ip_adapter_trainer.families._fit import demand_unet
from ip_adapter_trainer.nn.lean import lean_layers
from ip_adapter_trainer.nn.packed import Storage, pack

PROCESSOR = ".processor"
# Not packed: both ends, the embeddings of time, which all layers read, and the text's K and V, which pairs start from.
_SPARED = ("conv_in", "conv_out", "time_embedding", "add_embedding", "time_emb_proj", "attn2.to_k", "attn2.to_v")


def lay_out_autoencoder(vae: Any) -> None:
    """Lays a half precision autoencoder out channels-last.

    One core with AMX, SD1.5, 256 px, bf16: a picture is encoded in 0.69 s, with channels first in 1.62 s.
    """
    if vae.dtype != torch.float32:
        vae.to(memory_format=torch.channels_last)


def pack_denoiser(unet: torch.nn.Module, storage: Storage, device: torch.device | str) -> None:
    """Packs a frozen UNet's large layers on a device; they stay where they are.

    Raises:
        Problem: the storage's library is not installed.
    """
    pack(unet, storage, device, lambda name: any(part in name for part in _SPARED))


class UNetFamily(Family):
    """A family whose denoiser is a `UNet2DConditionModel` and whose pictures live in an `AutoencoderKL`."""

    layer_groups = {"up": ("up_blocks",)}  # noqa: RUF012
    components = {  # noqa: RUF012
        "autoencoder": ("vae",), "denoiser": ("unet",), "text": ("tokenizer", "text_encoder"),
    }  # fmt: skip
    classes = {  # noqa: RUF012
        "vae": ("AutoencoderKL",),
        "unet": ("UNet2DConditionModel",),
        "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
        "text_encoder": ("CLIPTextModel", "CLIPTextModelWithProjection"),
    }

    embeddings: ClassVar[tuple[str, ...]] = ("prompt_embeds", "negative_prompt_embeds")  # as its pipeline gives them
    pipeline_class: ClassVar[str]  # of diffusers
    addition: ClassVar[str | None] = None  # what its UNet embeds beside the time
    left_out: ClassVar[Mapping[str, Any]]  # arguments by which the pipeline is made without what training never needs

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline
        self.denoiser = pipeline.unet
        if self.denoiser is not None:
            self.context_dim = int(self.denoiser.config.cross_attention_dim)

    @classmethod
    def matches(cls, model_index: Mapping[str, Any]) -> bool:
        """Return whether a pipeline has the family's parts, whatever it is for: a null part is told of later."""
        entries = {name: entry for name, entry in model_index.items() if isinstance(entry, list) and len(entry) == 2}
        has_second = "text_encoder_2" in entries
        return has_second == ("text_encoder_2" in cls.classes) and all(
            name in entries and (entries[name][1] is None or entries[name][1] in kinds)
            for name, kinds in cls.classes.items()
            if name in ("unet", "text_encoder", "text_encoder_2")
        )

    @classmethod
    def demand(cls, settings: Mapping[str, Mapping[str, Any]], clip_skip: int | None, where: str) -> None:
        """See `Family.demand`: channels, conditions and widths."""
        demand_unet(settings, cls.addition, where)

    @classmethod
    def assemble(cls, loaded: Mapping[str, Any], model_index: Mapping[str, Any], config: Part) -> Self:
        """See `Family.assemble`."""
        import diffusers

        kind = getattr(diffusers, cls.pipeline_class)
        taken = inspect.signature(kind.__init__).parameters
        said = {name: value for name, value in model_index.items() if name in taken and not isinstance(value, list)}
        absent = dict.fromkeys(name for name in cls.classes if name not in loaded)
        pipeline = kind(**{**said, **cls.left_out, **absent, **loaded})
        pipeline.set_progress_bar_config(disable=True)
        return cls(pipeline)

    def settle(self, device: torch.device | str, storage: Storage, packed_on: torch.device | str) -> None:
        """See `Family.settle`."""
        if self.denoiser is not None:
            pack_denoiser(self.denoiser, storage, packed_on)
        self.pipeline.to(device)
        if self.pipeline.vae is not None:
            lay_out_autoencoder(self.pipeline.vae)

    def sites(self) -> list[Site]:
        """N counts every attention processor in module order (down, up, mid), so cross-attention has the odd ones."""
        found = []
        for number, key in enumerate(self.denoiser.attn_processors):
            name = key.removesuffix(PROCESSOR)
            if name.endswith("attn2"):
                width, context_dim = self.denoiser.get_submodule(name).to_k.weight.shape
                found.append(Site(number, name, width, context_dim))
        return found

    def site_weights(self, site: Site) -> tuple[Tensor, Tensor]:
        """See `Family.site_weights`."""
        layer = self.denoiser.get_submodule(site.name)
        return layer.to_k.weight, layer.to_v.weight

    def install(self, processors: Mapping[str, Any]) -> dict[str, Any]:
        """See `Family.install`."""
        replaced: dict[str, Any] = {}
        for name, processor in processors.items():
            layer = self.denoiser.get_submodule(name)
            if layer.group_norm is not None or layer.spatial_norm is not None or layer.residual_connection:
                raise Problem("this attention layer has norms that no adapter was made for", where=name)
            replaced[name] = layer.processor
            layer.set_processor(processor)
        return replaced

    def processors(self) -> dict[str, Any]:
        """See `Family.processors`."""
        return {site.name: self.denoiser.get_submodule(site.name).processor for site in self.sites()}

    def latent_shape(self, height_px: int, width_px: int) -> tuple[int, int, int]:
        """See `Family.latent_shape`."""
        factor = 2 ** (len(self.pipeline.vae.config.block_out_channels) - 1)
        return int(self.pipeline.vae.config.latent_channels), height_px // factor, width_px // factor

    def _text(self, kind: str) -> list[Any]:
        """The pipeline's text encoders or tokenizers, which are called alike and numbered from the second on."""
        return [self.pipeline.components[name] for name in self.components["text"] if name.startswith(kind)]

    def embedded_prompts(self, prompts: Sequence[str], negative: str, *, guided: bool) -> dict[str, Any]:
        """See `Family.embedded_prompts`."""
        with self.reading_prompts():
            made = self.pipeline.encode_prompt(
                prompt=list(prompts),
                device=self.device,
                num_images_per_prompt=1,
                do_classifier_free_guidance=guided,
                negative_prompt=[negative] * len(prompts) if negative else None,  # None: the pipeline's own empty one
            )
        return dict(zip(self.embeddings, made, strict=True))

    @property
    def text_encoders(self) -> Sequence[Any]:
        """See `Family.text_encoders`."""
        return self._text("text_encoder")

    @property
    def tokenizers(self) -> Sequence[Any]:
        """See `Family.tokenizers`."""
        return self._text("tokenizer")

    @property
    def text_rules(self) -> str:
        """See `Family.text_rules`."""
        words = [(sorted(t.get_vocab().items()), t.model_max_length) for t in self.tokenizers]
        rules: list[Any] = [words, self.pipeline.config.get("force_zeros_for_empty_prompt")]
        return json.dumps(rules + ([self.clip_skip] if self.clip_skip else []))

    @property
    def autoencoder(self) -> Any:
        """See `Family.autoencoder`."""
        return self.pipeline.vae

    @torch.no_grad()
    def encode_moments(self, pixels: Tensor) -> Tensor:
        """See `Family.encode_moments`."""
        vae = self.pipeline.vae
        with lean_layers(vae.encoder, products=False):
            moments: Tensor = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.parameters
        return moments

    def release_encoder(self) -> None:
        """See `Family.release_encoder`; the other half still decodes."""
        self.pipeline.vae.encoder = self.pipeline.vae.quant_conv = None

    @torch.no_grad()
    def sample_latents(self, moments: Tensor, noise: Tensor) -> Tensor:
        """See `Family.sample_latents`; normalised by `latents_mean` and `latents_std` where the VAE has them."""
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

        posterior, config = DiagonalGaussianDistribution(moments.float()), self.pipeline.vae.config
        latents = posterior.mean + posterior.std * to_device(noise, moments.device)
        if getattr(config, "latents_mean", None) and getattr(config, "latents_std", None):
            stated = torch.tensor([config.latents_mean, config.latents_std], dtype=latents.dtype)
            mean, std = to_device(stated, latents.device).view(2, 1, -1, 1, 1)
            return (latents - mean) * config.scaling_factor / std
        return latents * config.scaling_factor

    def predict(self, noisy: Tensor, timesteps: Tensor, text: TextCondition) -> Tensor:
        """See `Family.predict`."""
        extra = text.extra or None
        return self.denoiser(noisy, timesteps, text.context, added_cond_kwargs=extra, return_dict=False)[0]
