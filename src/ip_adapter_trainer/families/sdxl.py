"""Stable Diffusion XL: two text encoders and micro-conditioning on size and crop (arXiv 2307.01952, section 2.2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ip_adapter_trainer.core.settings import Part
from ip_adapter_trainer.core.types import Geometry, TextCondition
from ip_adapter_trainer.families._family import FAMILIES, PARTS, PartName
from ip_adapter_trainer.families._unet import UNetFamily, load_pipeline


@FAMILIES.register("sdxl")
class StableDiffusionXL(UNetFamily):
    """SDXL base models."""

    Config = Part
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

    @classmethod
    def matches(cls, model_index: Mapping[str, Any]) -> bool:
        """The SDXL text-to-image pipeline."""
        return model_index.get("_class_name") == "StableDiffusionXLPipeline"

    @classmethod
    def load(
        cls,
        path: str,
        config: Part,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        parts: Sequence[PartName] = PARTS,
    ) -> StableDiffusionXL:
        """See `Family.load`."""
        from diffusers import StableDiffusionXLPipeline

        without = {"image_encoder": None, "add_watermarker": False, **cls.without(parts)}
        pipeline = load_pipeline(StableDiffusionXLPipeline, path, dtype=dtype, device=device, **without)
        if dtype == torch.float16 and pipeline.vae is not None and pipeline.vae.config.force_upcast:
            pipeline.vae.to(torch.float32)  # SDXL's own VAE overflows in fp16; the pipeline upcasts it likewise
        return cls(pipeline)

    @torch.no_grad()
    def encode_captions(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Both encoders' penultimate states side by side, and the second one's pooled embedding [B, P].

        Where the pipeline zeroes the empty prompt (`force_zeros_for_empty_prompt`), an empty text is zeros here too:
        the encoding of "" is not what it feeds as unconditional.
        """
        context, _, pooled, _ = self.pipeline.encode_prompt(
            list(texts), device=self.pipeline.device, do_classifier_free_guidance=False
        )
        if self.pipeline.config.force_zeros_for_empty_prompt:
            named = torch.tensor([bool(text) for text in texts], device=context.device, dtype=context.dtype)
            context, pooled = context * named[:, None, None], pooled * named[:, None]
        return {"context": context, "text_embeds": pooled}

    def condition(self, captions: Mapping[str, Tensor], geometry: Sequence[Geometry]) -> TextCondition:
        """See `Family.condition`; adds six numbers of geometry a picture, `time_ids` [B, 6]."""
        context = captions["context"]
        numbers = [[*g.original_px, *g.crop_px, *g.target_px] for g in geometry]
        time_ids = torch.tensor(numbers, device=context.device, dtype=context.dtype)
        return TextCondition(context, {"text_embeds": captions["text_embeds"], "time_ids": time_ids})
