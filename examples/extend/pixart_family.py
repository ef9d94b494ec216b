"""A family: PixArt-Sigma (arXiv 2403.04692), a transformer that reads text of T5 by cross-attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import PixArtSigmaPipeline
from torch import Tensor

from ip_adapter_trainer.core.settings import Part
from ip_adapter_trainer.core.values import Geometry
from ip_adapter_trainer.families import FAMILIES, Denoiser, Family, KLCodec, without_parts


class PixArtCodec(KLCodec):
    """AutoencoderKL and a T5 encoder, with the mask of padding."""

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """See `Codec.encode`: [B, L, D] and a mask [B, L]."""
        encoder, tokenizer = self.pipeline.text_encoder, self.pipeline.tokenizer
        words = tokenizer(list(captions), padding="max_length", truncation=True, return_tensors="pt").to(encoder.device)
        context = encoder(words.input_ids, attention_mask=words.attention_mask)[0]
        return {"context": context, "mask": words.attention_mask.to(context.dtype)}


class PixArtDenoiser(Denoiser):
    """A `PixArtTransformer2DModel`, which predicts noise, and a variance that nothing reads here."""

    layouts = ("own",)
    attention = {"attn2": "cross"}  # noqa: RUF012

    def __init__(self, pipeline: Any) -> None:
        self.pipeline, self.net = pipeline, pipeline.transformer
        if self.net is not None:
            self.context_dim = int(self.net.config.caption_channels)

    def predict(self, noisy: Tensor, time: Tensor, text: dict[str, Tensor], geometry: Sequence[Geometry]) -> Tensor:
        """See `Denoiser.predict`: [B, C, h, w]."""
        sizes = {"resolution": None, "aspect_ratio": None}
        out = self.net(
            noisy, encoder_hidden_states=text["context"], encoder_attention_mask=text["mask"], timestep=time,
            added_cond_kwargs=sizes, return_dict=False,
        )[0]  # fmt: skip
        return out.chunk(2, 1)[0] if out.shape[1] == 2 * noisy.shape[1] else out

    def sampling(self, positive: dict[str, Tensor], negative: dict[str, Tensor] | None) -> dict[str, Any]:
        """See `Denoiser.sampling`."""
        made = {"prompt_embeds": positive["context"], "prompt_attention_mask": positive["mask"]}
        if negative:
            made |= {"negative_prompt_embeds": negative["context"], "negative_prompt_attention_mask": negative["mask"]}
        return {**made, "negative_prompt": None, "use_resolution_binning": False}


@FAMILIES.register("pixart")
class PixArt(Family):
    """PixArt-Sigma."""

    components = {  # noqa: RUF012
        "autoencoder": ("vae",), "denoiser": ("transformer",), "text": ("tokenizer", "text_encoder"),
    }  # fmt: skip
    classes = {  # noqa: RUF012
        "vae": ("AutoencoderKL",), "transformer": ("PixArtTransformer2DModel",), "text_encoder": ("T5EncoderModel",),
        "tokenizer": ("T5Tokenizer", "T5TokenizerFast"),
    }  # fmt: skip

    @classmethod
    def matches(cls, model_index: Mapping[str, Any]) -> bool:
        """See `Family.matches`."""
        return model_index.get("_class_name") == "PixArtSigmaPipeline"

    @classmethod
    def assemble(cls, loaded: Any, model_index: Any, config: Part, clip_skip: int | None) -> Any:
        """See `Family.assemble`."""
        pipeline = without_parts(PixArtSigmaPipeline, dict(loaded), {}, [n for n in cls.classes if n not in loaded])
        return PixArtCodec(pipeline), PixArtDenoiser(pipeline)
