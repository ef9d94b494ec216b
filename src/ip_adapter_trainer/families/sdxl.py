"""Stable Diffusion XL: two text encoders and micro-conditioning on size and crop (arXiv 2307.01952, section 2.2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ip_adapter_trainer.core.devices import to_device
from ip_adapter_trainer.core.errors import Problem
from ip_adapter_trainer.core.settings import Part
from ip_adapter_trainer.core.values import Geometry, TextCondition
from ip_adapter_trainer.families._family import FAMILIES
from ip_adapter_trainer.families._text import run_text_encoder
from ip_adapter_trainer.families._unet import UNetFamily


@FAMILIES.register("sdxl")
class StableDiffusionXL(UNetFamily):
    """SDXL base models."""

    Config = Part
    pipeline_class = "StableDiffusionXLPipeline"
    embeddings = (*UNetFamily.embeddings, "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    left_out = {"image_encoder": None, "feature_extractor": None, "add_watermarker": False}  # noqa: RUF012
    name = "sdxl"
    layer_groups = {  # noqa: RUF012
        **UNetFamily.layer_groups,
        "style": ("up_blocks.0.attentions.1",),  # InstantStyle (arXiv 2404.02733), section 3.2
        "layout": ("down_blocks.2.attentions.1",),
    }
    components = {  # noqa: RUF012
        **UNetFamily.components,
        "text": ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2"),
    }
    classes = {  # noqa: RUF012
        **UNetFamily.classes,
        "tokenizer_2": UNetFamily.classes["tokenizer"],
        "text_encoder_2": ("CLIPTextModelWithProjection",),
    }
    addition = "text_time"

    def __init__(self, pipeline: Any) -> None:
        super().__init__(pipeline)
        vae = pipeline.vae
        if vae is not None and vae.dtype == torch.float16 and vae.config.force_upcast:
            vae.to(torch.float32)  # SDXL's own VAE overflows in fp16; the pipeline upcasts it likewise

    @classmethod
    def demand(cls, settings: Mapping[str, Mapping[str, Any]], clip_skip: int | None, where: str) -> None:
        """See `Family.demand`."""
        super().demand(settings, clip_skip, where)
        if clip_skip is not None:
            what = "SDXL reads the last layer but one of both text encoders, and no other, as in kohya's scripts"
            raise Problem(what, where="--clip_skip", remedy="leave --clip_skip out")

    @torch.no_grad()
    def encode_captions(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Both encoders' penultimate states side by side, and the second one's pooled embedding [B, P].

        Where the pipeline zeroes the empty prompt (`force_zeros_for_empty_prompt`), an empty text is zeros here too:
        the encoding of "" is not what it feeds as unconditional.
        """
        pipeline = self.pipeline
        first = run_text_encoder(pipeline.tokenizer, pipeline.text_encoder, texts)
        second = run_text_encoder(pipeline.tokenizer_2, pipeline.text_encoder_2, texts)
        context, pooled = torch.cat((first.hidden_states[-2], second.hidden_states[-2]), -1), second.text_embeds
        if self.pipeline.config.force_zeros_for_empty_prompt:
            named = to_device(torch.tensor([bool(text) for text in texts], dtype=context.dtype), context.device)
            context, pooled = context * named[:, None, None], pooled * named[:, None]
        return {"context": context, "text_embeds": pooled}

    def condition(self, captions: Mapping[str, Tensor], geometry: Sequence[Geometry]) -> TextCondition:
        """See `Family.condition`; adds six numbers of geometry a picture, `time_ids` [B, 6]."""
        context = captions["context"]
        numbers = [[*g.original_px, *g.crop_px, *g.target_px] for g in geometry]
        time_ids = to_device(torch.tensor(numbers, dtype=context.dtype), context.device)
        return TextCondition(context, {"text_embeds": captions["text_embeds"], "time_ids": time_ids})
