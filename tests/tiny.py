"""Real pipelines and encoders of a few thousand parameters, in the ordinary folder layouts, with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    BitImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from ip_adapter_trainer.pocket import models

Base = Literal["sd1", "sd2v", "sdxl", "sdxlv"]
BASES: tuple[Base, ...] = ("sd1", "sd2v", "sdxl", "sdxlv")
Encoder = Literal["siglip", "siglip2", "dinov2", "dinov2_with_registers"]
ENCODERS: tuple[Encoder, ...] = ("siglip", "siglip2", "dinov2", "dinov2_with_registers")
UNETS: tuple[Base, ...] = BASES[:3]  # where only the denoiser matters
FEATURES = ("image_embeds", "penultimate")  # of every image encoder
CONTEXT_DIM = {"sd1": 64, "sd2v": 128, "sdxl": 128, "sdxlv": 160}


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16, 16), layers_per_block=1, norm_num_groups=4, latent_channels=4, sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
    )  # fmt: skip


def _text(width: int, projected: bool) -> Any:
    words = models.tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(words), hidden_size=width, intermediate_size=2 * width, projection_dim=width,
        num_hidden_layers=3, num_attention_heads=2, max_position_embeddings=models.MAX_TOKENS,
        bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def _unet(kind: Base) -> UNet2DConditionModel:
    shared: dict[str, Any] = {
        "sample_size": 8, "block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8,
        "cross_attention_dim": CONTEXT_DIM[kind],
    }  # fmt: skip
    if kind in ("sdxl", "sdxlv"):
        return UNet2DConditionModel(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2), attention_head_dim=(2, 4), use_linear_projection=True,
            addition_embed_type="text_time", addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=CONTEXT_DIM[kind] - 64 + 6 * 8, **shared,
        )  # fmt: skip
    return UNet2DConditionModel(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2 if kind == "sd1" else (2, 4), use_linear_projection=kind == "sd2v", **shared,
    )  # fmt: skip


def _scheduler(kind: Base) -> Any:
    betas: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    if kind == "sdxlv":
        return EulerDiscreteScheduler(
            prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing", **betas
        )
    return DDIMScheduler(
        clip_sample=False, set_alpha_to_one=False, steps_offset=1,
        prediction_type="v_prediction" if kind == "sd2v" else "epsilon", **betas,
    )  # fmt: skip


def make_base(folder: Path, kind: Base = "sd1", seed: int = 0) -> Path:
    """Writes a pipeline folder.

    `sd2v` predicts v; `sdxl` has two text encoders and micro-conditioning; `sdxlv` too, and predicts v down to a
    terminal SNR of zero, as NoobAI does.
    """
    torch.manual_seed(seed)
    parts: dict[str, Any] = {
        "vae": _vae(),
        "unet": _unet(kind),
        "scheduler": _scheduler(kind),
        "tokenizer": models.tokenizer(),
    }
    if kind in ("sdxl", "sdxlv"):
        parts |= {
            "tokenizer_2": models.tokenizer(),
            "text_encoder": _text(64, False),
            "text_encoder_2": _text(CONTEXT_DIM[kind] - 64, True),
        }
        StableDiffusionXLPipeline(**parts).save_pretrained(folder)
    else:
        parts |= {"text_encoder": _text(CONTEXT_DIM[kind], False), "safety_checker": None, "feature_extractor": None}
        StableDiffusionPipeline(**parts, requires_safety_checker=False).save_pretrained(folder)
    return folder


def make_encoder(folder: Path, *, hidden: int = 48, projection: int = 40, side_px: int = 32, seed: int = 1) -> Path:
    """Writes a `CLIPVisionModelWithProjection` folder of 8 px patches."""
    torch.manual_seed(seed)
    config = CLIPVisionConfig(
        hidden_size=hidden, intermediate_size=2 * hidden, projection_dim=projection, num_hidden_layers=3,
        num_attention_heads=4, image_size=side_px, patch_size=8,
    )  # fmt: skip
    CLIPVisionModelWithProjection(config).save_pretrained(folder)
    return folder


def make_other_encoder(folder: Path, kind: Encoder) -> Path:
    """Writes an image encoder of another kind, 32 px and 8 px patches, with its preprocessing.

    `siglip` is the half that sees alone; `siglip2` a whole model with text, as SigLIP 2 of fixed resolution is.
    """
    torch.manual_seed(4)
    sizes: dict[str, Any] = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3}
    sizes |= {"num_attention_heads": 4, "image_size": 32, "patch_size": 8}
    if kind == "siglip":
        SiglipVisionModel(SiglipVisionConfig(**sizes)).save_pretrained(folder)
    elif kind == "siglip2":
        text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        SiglipModel(SiglipConfig(vision_config=sizes, text_config=text | {"vocab_size": 64})).save_pretrained(folder)
    elif kind == "dinov2":
        Dinov2Model(Dinov2Config(**sizes, mlp_ratio=2)).save_pretrained(folder)
    else:
        Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**sizes, mlp_ratio=2)).save_pretrained(folder)
    if kind.startswith("siglip"):
        processor: Any = SiglipImageProcessorPil(size={"height": 32, "width": 32})
    else:
        processor = BitImageProcessorPil(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32})
    processor.save_pretrained(folder)
    return folder


def make_scorer(folder: Path) -> Path:
    """Writes a random CLIP with both towers, its tokenizer and its preprocessing."""
    torch.manual_seed(3)
    models.clip().save_pretrained(folder)
    models.tokenizer().save_pretrained(folder)
    models.image_processor().save_pretrained(folder)
    return folder
