"""Stable Diffusion 1.x and 2.x: one text encoder; epsilon or v-prediction, as the scheduler's config says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ip_adapter_trainer.core.errors import Problem
from ip_adapter_trainer.core.settings import Part
from ip_adapter_trainer.families._family import FAMILIES
from ip_adapter_trainer.families._text import run_text_encoder
from ip_adapter_trainer.families._unet import UNetFamily


@FAMILIES.register("sd")
class StableDiffusion(UNetFamily):
    """SD1.x and SD2.x."""

    Config = Part
    pipeline_class = "StableDiffusionPipeline"
    left_out = {  # noqa: RUF012
        "safety_checker": None, "requires_safety_checker": False, "feature_extractor": None, "image_encoder": None,
    }  # fmt: skip
    name = "sd"

    @classmethod
    def demand(cls, settings: Mapping[str, Mapping[str, Any]], clip_skip: int | None, where: str) -> None:
        """See `Family.demand`."""
        super().demand(settings, clip_skip, where)
        layers = settings.get("text_encoder", {}).get("num_hidden_layers")
        if clip_skip is not None and isinstance(layers, int) and clip_skip > layers:
            what = f"the text encoder has {layers} layers, of which the last but {clip_skip - 1} is asked for"
            raise Problem(what, where="--clip_skip", remedy="give 1 for the last layer, 2 for the one before it")

    @torch.no_grad()
    def encode_captions(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Last hidden states of the text encoder, as `pipeline.encode_prompt` gives them, or those of `clip_skip`."""
        encoder = self.pipeline.text_encoder
        output = run_text_encoder(self.pipeline.tokenizer, encoder, texts)
        if self.clip_skip is None:
            return {"context": output.last_hidden_state}
        norm = getattr(encoder, "text_model", encoder).final_layer_norm
        return {"context": norm(output.hidden_states[-self.clip_skip])}

    def embedded_prompts(self, prompts: Sequence[str], negative: str, *, guided: bool) -> dict[str, Any]:
        """See `Family.embedded_prompts`; diffusers' own way to skip layers fails beside transformers 5."""
        if self.clip_skip is None:
            return super().embedded_prompts(prompts, negative, guided=guided)
        with self.reading_prompts():
            positive = self.encode_captions(prompts)["context"]
            negatives = self.encode_captions([negative] * len(prompts))["context"] if guided else None
        return dict(zip(self.embeddings, (positive, negatives), strict=True))
