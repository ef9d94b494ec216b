"""SD1.5 and ViT-H/14 at their real sizes, with random weights, as folders: sizes from their public configs."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModelWithProjection

from ip_adapter_trainer.pocket import models


def write_base(folder: Path) -> None:
    """A Stable Diffusion 1.5 pipeline folder (bf16 on disk, so that 2 GB suffice)."""
    unet = UNet2DConditionModel(
        sample_size=64, cross_attention_dim=768, attention_head_dim=8, block_out_channels=(320, 640, 1280, 1280)
    )
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, sample_size=512,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    text = CLIPTextModel(
        CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    )
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip
    parts = {"unet": unet, "vae": vae, "text_encoder": text, "tokenizer": models.tokenizer(), "scheduler": scheduler}
    pipeline = StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipeline.to(dtype=torch.bfloat16).save_pretrained(folder)


def write_encoder(folder: Path) -> None:
    """An OpenCLIP ViT-H/14 image encoder folder."""
    config = CLIPVisionConfig(
        hidden_size=1280, intermediate_size=5120, projection_dim=1024, num_hidden_layers=32, num_attention_heads=16,
        image_size=224, patch_size=14, hidden_act="gelu",
    )  # fmt: skip
    CLIPVisionModelWithProjection(config).to(torch.bfloat16).save_pretrained(folder)
