"""Stable Diffusion 1.x and 2.x: one text encoder; epsilon or v-prediction, as the scheduler's config says."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ip_adapter_trainer.core.settings import Part
from ip_adapter_trainer.families._family import FAMILIES
from ip_adapter_trainer.families._text import run_text_encoder
from ip_adapter_trainer.families._unet import UNetFamily


@FAMILIES.register("sd")
class StableDiffusion(UNetFamily):
    """SD1.x and SD2.x."""

    Config = Part
    pipeline_class = "StableDiffusionPipeline"
    left_out = {"safety_checker": None, "requires_safety_checker": False, "image_encoder": None}  # noqa: RUF012
    name = "sd"
    small_cards = {  # noqa: RUF012
        8: {"mixed_precision": "bf16", "prepare": "auto", "encode_batch_size": 4, "train_batch_size": 4},
        12: {"mixed_precision": "bf16", "prepare": "auto", "train_batch_size": 8},
        24: {"mixed_precision": "bf16", "prepare": "auto", "train_batch_size": 16},
    }

    @torch.no_grad()
    def encode_captions(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Last hidden states of the text encoder, as `pipeline.encode_prompt` gives them."""
        output = run_text_encoder(self.pipeline.tokenizer, self.pipeline.text_encoder, texts)
        return {"context": output.last_hidden_state}
