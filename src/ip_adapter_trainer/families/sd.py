"""Stable Diffusion 1.x and 2.x: one text encoder; epsilon or v-prediction, as the scheduler's config says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ip_adapter_trainer.core.errors import Problem
from ip_adapter_trainer.families._family import FAMILIES
from ip_adapter_trainer.families._text import run_text_encoder
from ip_adapter_trainer.families._unet import UNetCodec, UNetFamily

if TYPE_CHECKING:
    from torch import Tensor


class SDCodec(UNetCodec):
    """One CLIP text encoder."""

    def encode(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """See `Codec.encode`: the last hidden states, as `pipeline.encode_prompt` gives them, or `clip_skip`'s."""
        import torch

        encoder = self.pipeline.text_encoder
        with torch.no_grad():
            output = run_text_encoder(self.pipeline.tokenizer, encoder, captions)
            if self.clip_skip is None:
                return {"context": output.last_hidden_state}
            norm = getattr(encoder, "text_model", encoder).final_layer_norm
            return {"context": norm(output.hidden_states[-self.clip_skip])}


@FAMILIES.register("sd")
class StableDiffusion(UNetFamily):
    """SD1.x and SD2.x."""

    pipeline_class = "StableDiffusionPipeline"
    codec = SDCodec
    left_out = {  # noqa: RUF012
        "safety_checker": None, "requires_safety_checker": False, "feature_extractor": None, "image_encoder": None,
    }  # fmt: skip

    @classmethod
    def demand(cls, settings: Mapping[str, Mapping[str, Any]], clip_skip: int | None, where: str) -> None:
        """See `Family.demand`."""
        super().demand(settings, clip_skip, where)
        layers = settings.get("text_encoder", {}).get("num_hidden_layers")
        if clip_skip is not None and isinstance(layers, int) and clip_skip > layers:
            what = f"the text encoder has {layers} layers, of which the last but {clip_skip - 1} is asked for"
            raise Problem(what, where="--clip_skip", remedy="give 1 for the last layer, 2 for the one before it")
