"""The models that are measured: sizes from their public configs, weights random but the same on both sides."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from ip_adapter_trainer.adapters import VARIANTS
from ip_adapter_trainer.encoders.clip import ClipEncoder
from ip_adapter_trainer.families import FAMILIES, BaseModel
from ip_adapter_trainer.layouts import make_layout
from ip_adapter_trainer.model import Architecture, Model
from ip_adapter_trainer.pocket import models

SEED = 0
TOKENS = 4  # of the base variant
TEXT_LENGTH = 77

Table = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """One base model with its image encoder, as tables of constructor arguments."""

    family: str  # of the package: sd or sdxl
    unet: Table
    vae: Table
    texts: tuple[Table, ...]  # one or two text encoders
    image: Table
    runs: dict[str, tuple[tuple[int, int], ...]] = field(default_factory=dict)  # device: (side in px, images a step)


def _vae(*widths: int, layers: int = 2, groups: int = 32, scale: float = 0.18215) -> Table:
    blocks = len(widths)
    return {
        "block_out_channels": widths, "layers_per_block": layers, "latent_channels": 4, "norm_num_groups": groups,
        "down_block_types": ("DownEncoderBlock2D",) * blocks, "up_block_types": ("UpDecoderBlock2D",) * blocks,
        "scaling_factor": scale,
    }  # fmt: skip


def _clip(width: int, layers: int, heads: int, projection: int, **more: Any) -> Table:
    return {
        "hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers,
        "num_attention_heads": heads, "projection_dim": projection,
    } | more  # fmt: skip


VIT_H = _clip(1280, 32, 16, 1024, image_size=224, patch_size=14, hidden_act="gelu")
VIT_BIG_G = _clip(1664, 48, 16, 1280, intermediate_size=8192, image_size=224, patch_size=14, hidden_act="gelu")

SIZES = {
    "tiny": Size(
        "sd",
        unet={
            "block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8, "cross_attention_dim": 64,
            "attention_head_dim": 2, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        },
        vae=_vae(8, 16, 16, layers=1, groups=4),
        texts=(_clip(64, 3, 2, 64),),
        image=_clip(48, 3, 4, 40, image_size=32, patch_size=8),
        runs={"cpu": ((32, 2),), "cuda": ((32, 2),)},
    ),
    "half": Size(  # SD1.5 at half its width; encoders to match
        "sd",
        unet={"block_out_channels": (160, 320, 640, 640), "cross_attention_dim": 384, "attention_head_dim": 8},
        vae=_vae(64, 128, 256, 256),
        texts=(_clip(384, 12, 6, 384),),
        image=_clip(640, 32, 8, 512, image_size=224, patch_size=14, hidden_act="gelu"),
        runs={"cpu": ((256, 1),)},
    ),
    "sd15": Size(
        "sd",
        unet={"block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768, "attention_head_dim": 8},
        vae=_vae(128, 256, 512, 512),
        texts=(_clip(768, 12, 12, 768),),
        image=VIT_H,
        runs={"cpu": ((256, 1), (256, 4)), "cuda": ((512, 1), (512, 8), (512, 32))},
    ),
    "sdxl": Size(
        "sdxl",
        unet={
            "block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048, "attention_head_dim": (5, 10, 20),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10), "use_linear_projection": True,
            "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        vae=_vae(128, 256, 512, 512, scale=0.13025),
        texts=(_clip(768, 12, 12, 768), _clip(1280, 32, 20, 1280, hidden_act="gelu")),
        image=VIT_BIG_G,
        runs={"cuda": ((1024, 1), (1024, 8), (1024, 32))},
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Nets:
    """The frozen parts in fp32."""

    pipeline: Any  # a diffusers pipeline: UNet, VAE, text encoders, tokenizers, scheduler
    image_encoder: CLIPVisionModelWithProjection


def _text(table: Table, words: Any, projected: bool) -> nn.Module:
    ids = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    kind: Any = CLIPTextModelWithProjection if projected else CLIPTextModel
    return kind(CLIPTextConfig(max_position_embeddings=TEXT_LENGTH, **ids, **table))


def build(size: Size, device: torch.device | str, seed: int = SEED) -> Nets:
    """The frozen parts on a device, their weights drawn from a seed; `meta` has shapes and no weights."""
    words = copy.deepcopy(models.tokenizer())
    words.model_max_length = TEXT_LENGTH
    torch.manual_seed(seed)
    with torch.device(device):
        parts: Table = {
            "unet": UNet2DConditionModel(**size.unet),
            "vae": AutoencoderKL(**size.vae),
            "text_encoder": _text(size.texts[0], words, False),
        }
        if size.family == "sdxl":
            parts["text_encoder_2"] = _text(size.texts[1], words, True)
        image_encoder = CLIPVisionModelWithProjection(CLIPVisionConfig(**size.image))
    parts |= {"tokenizer": words, "scheduler": models.scheduler()}
    for part in (*parts.values(), image_encoder):
        if isinstance(part, nn.Module):
            part.eval().requires_grad_(False)
    if size.family == "sdxl":
        return Nets(StableDiffusionXLPipeline(tokenizer_2=words, **parts), image_encoder)
    without: Table = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return Nets(StableDiffusionPipeline(**parts, **without), image_encoder)


def projector_weights(size: Size, device: torch.device | str, seed: int = SEED) -> dict[str, Tensor]:
    """First weights of the base variant's projector, Linear and LayerNorm, by their published names."""
    context_dim, feature_dim = size.unet["cross_attention_dim"], size.image["projection_dim"]
    numbers = torch.Generator().manual_seed(seed)
    weight, bias = (torch.randn(TOKENS * context_dim, n, generator=numbers) for n in (feature_dim, 1))
    weights = {
        "proj.weight": weight * feature_dim**-0.5,
        "proj.bias": bias[:, 0] * feature_dim**-0.5,  # not zero, or the norm of a dropped picture's tokens is singular
        "norm.weight": torch.ones(context_dim),
        "norm.bias": torch.zeros(context_dim),
    }
    return {name: tensor.to(device) for name, tensor in weights.items()}


def model_of(size: Size, nets: Nets, layers: Sequence[str] = ("all",)) -> Model:
    """The package's model of the base variant on frozen parts; `layers` as `--adapter_layers`."""
    entry: Any = FAMILIES[size.family]
    base = BaseModel(size.family, entry.codec(nets.pipeline, None), entry.denoiser(nets.pipeline))
    encoder, kind = ClipEncoder(nets.image_encoder, Path("none"), "random weights"), VARIANTS["base"]
    return Model(base, {"image": encoder}, Architecture(kind, kind.Config(), make_layout("unet"), layers=layers))
