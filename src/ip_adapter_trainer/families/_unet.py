"""What all families with a `UNet2DConditionModel` share: sites, their numbering, latents, prediction."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from ip_adapter_trainer.core.devices import to_device
from ip_adapter_trainer.core.errors import Problem, told_as_not_loaded
from ip_adapter_trainer.core.log import quiet_loading
from ip_adapter_trainer.core.settings import Part
from ip_adapter_trainer.core.types import Site, TextCondition
from ip_adapter_trainer.families._family import PARTS, Family, PartName
from ip_adapter_trainer.nn.lean import lean_layers
from ip_adapter_trainer.nn.packed import Storage, pack

PROCESSOR = ".processor"
# Not packed: both ends, the embeddings of time, which all layers read, and the text's K and V, which pairs start from.
_SPARED = ("conv_in", "conv_out", "time_embedding", "add_embedding", "time_emb_proj", "attn2.to_k", "attn2.to_v")


def load_pipeline(
    cls: Any,
    path: str,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    storage: Storage = "none",
    packed_on: torch.device | str | None = None,
    **kwargs: Any,
) -> Any:
    """Loads a pipeline's frozen parts; see `Family.load`.

    Raises:
        Problem: a folder or hub id that diffusers cannot load, or a storage whose library is not installed.
    """
    quiet_loading()
    remedy = "give a diffusers pipeline folder or a hub id, with weights in .safetensors files"
    with told_as_not_loaded("the base model", path, remedy):
        pipeline = cls.from_pretrained(path, dtype=dtype, use_safetensors=True, **kwargs)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
    if pipeline.unet is not None:
        pack_denoiser(pipeline.unet, storage, packed_on or device)
    pipeline.to(device)
    if pipeline.vae is not None:
        lay_out_autoencoder(pipeline.vae)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


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


def _context_dim(unet: Any) -> int:
    dim = unet.config.cross_attention_dim
    if not isinstance(dim, int):
        what = f"the UNet's cross_attention_dim is {dim}, one width for all blocks is needed"
        raise Problem(what, where="unet/config.json", remedy="no adapter file could describe this model")
    return dim


class UNetFamily(Family):
    """A family whose denoiser is a `UNet2DConditionModel` and whose pictures live in an `AutoencoderKL`."""

    layer_groups = {"up": ("up_blocks",)}  # noqa: RUF012
    components: ClassVar[Mapping[PartName, tuple[str, ...]]] = {
        "autoencoder": ("vae",), "denoiser": ("unet",), "text": ("tokenizer", "text_encoder"),
    }  # fmt: skip

    embeddings: ClassVar[tuple[str, ...]] = ("prompt_embeds", "negative_prompt_embeds")  # as its pipeline gives them
    pipeline_class: ClassVar[str]  # of diffusers
    left_out: ClassVar[Mapping[str, Any]]  # arguments by which the pipeline loads without what training never needs

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline
        self.denoiser = pipeline.unet
        if self.denoiser is not None:
            self.context_dim = _context_dim(self.denoiser)

    @classmethod
    def matches(cls, model_index: Mapping[str, Any]) -> bool:
        """See `Family.matches`."""
        return model_index.get("_class_name") == cls.pipeline_class

    @classmethod
    def load(
        cls,
        path: str,
        config: Part,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        parts: Sequence[PartName] = PARTS,
        storage: Storage = "none",
        packed_on: torch.device | str | None = None,
    ) -> Self:
        """See `Family.load`."""
        import diffusers

        absent = [name for part, names in cls.components.items() if part not in parts for name in names]
        without: dict[str, Any] = {**cls.left_out, **dict.fromkeys(absent)}
        kind = getattr(diffusers, cls.pipeline_class)
        return cls(
            load_pipeline(kind, path, dtype=dtype, device=device, storage=storage, packed_on=packed_on, **without)
        )

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
    def text_rules(self) -> str:
        """See `Family.text_rules`."""
        words = [(sorted(t.get_vocab().items()), t.model_max_length) for t in self._text("tokenizer")]
        return json.dumps([words, self.pipeline.config.get("force_zeros_for_empty_prompt")])

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
