"""Stable Diffusion XL: two text encoders and micro-conditioning on size and crop (arXiv 2307.01952, section 2.2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ip_adapter_trainer.core.errors import Problem
from ip_adapter_trainer.core.values import to_device
from ip_adapter_trainer.families._family import FAMILIES
from ip_adapter_trainer.families._text import run_text_encoder
from ip_adapter_trainer.families._unet import UNetCodec, UNetDenoiser, UNetFamily

if TYPE_CHECKING:
    from torch import Tensor

    from ip_adapter_trainer.core.values import Geometry


class SDXLCodec(UNetCodec):
    """Two CLIP text encoders, side by side."""

    def __init__(self, pipeline: Any, clip_skip: int | None) -> None:
        import torch

        vae = pipeline.vae
        if vae is not None and vae.dtype == torch.float16 and vae.config.force_upcast:
            vae.to(torch.float32)  # SDXL's own VAE overflows in fp16; the pipeline upcasts it likewise
        super().__init__(pipeline, clip_skip)

    def prompts(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """See `Codec.prompts`: both encoders' penultimate states, and the second one's pooled embedding [B, P]."""
        import torch

        pipeline = self.pipeline
        with torch.no_grad():
            first = run_text_encoder(pipeline.tokenizer, pipeline.text_encoder, captions)
            second = run_text_encoder(pipeline.tokenizer_2, pipeline.text_encoder_2, captions)
            context = torch.cat((first.hidden_states[-2], second.hidden_states[-2]), -1)
            return {"context": context, "text_embeds": second.text_embeds}

    def encode(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """See `Codec.encode`.

        Where the pipeline zeroes the empty prompt (`force_zeros_for_empty_prompt`), an empty text is zeros here too:
        the encoding of "" is not what it feeds as unconditional.
        """
        import torch

        made = self.prompts(captions)
        if not self.pipeline.config.force_zeros_for_empty_prompt:
            return made
        context, pooled = made["context"], made["text_embeds"]
        is_said = torch.tensor([bool(caption) for caption in captions], dtype=context.dtype)
        kept = to_device(is_said, context.device)
        return {"context": context * kept[:, None, None], "text_embeds": pooled * kept[:, None]}


class SDXLDenoiser(UNetDenoiser):
    """SDXL's UNet, which embeds pooled text and six numbers of geometry beside the time."""

    layer_groups = {  # noqa: RUF012
        **UNetDenoiser.layer_groups,
        "style": ("up_blocks.0.attentions.1",),  # InstantStyle (arXiv 2404.02733), section 3.2
        "layout": ("down_blocks.2.attentions.1",),
    }

    def predict(self, noisy: Tensor, time: Tensor, text: dict[str, Tensor], geometry: Sequence[Geometry]) -> Tensor:
        """See `Denoiser.predict`; adds `time_ids` [B, 6]."""
        import torch

        context = text["context"]
        numbers = [[*g.original_px, *g.crop_px, *g.target_px] for g in geometry]
        time_ids = to_device(torch.tensor(numbers, dtype=context.dtype), context.device)
        return super().predict(noisy, time, {**text, "time_ids": time_ids}, geometry)

    def sampling(self, positive: dict[str, Tensor], negative: dict[str, Tensor] | None) -> dict[str, Any]:
        """See `Denoiser.sampling`."""
        pooled = {
            "pooled_prompt_embeds": positive["text_embeds"],
            "negative_pooled_prompt_embeds": negative and negative["text_embeds"],
        }
        return super().sampling(positive, negative) | pooled


@FAMILIES.register("sdxl")
class StableDiffusionXL(UNetFamily):
    """SDXL base models."""

    pipeline_class = "StableDiffusionXLPipeline"
    codec, denoiser = SDXLCodec, SDXLDenoiser
    left_out = {"image_encoder": None, "feature_extractor": None, "add_watermarker": False}  # noqa: RUF012
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

    @classmethod
    def demand(cls, settings: Mapping[str, Mapping[str, Any]], clip_skip: int | None, where: str) -> None:
        """See `Family.demand`."""
        super().demand(settings, clip_skip, where)
        if clip_skip is not None:
            what = "SDXL reads the last layer but one of both text encoders, and no other, as in kohya's scripts"
            raise Problem(what, where="--clip_skip", remedy="leave --clip_skip out")
