"""A pipeline folder as one file in the original layout, as civitai has them, with the names of CompVis' code."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Tensors = dict[str, Tensor]

_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
_UNET = {
    "conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0", "conv_out": "out.2", "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1", "mid_block.resnets.1": "middle_block.2",
}  # fmt: skip
_OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight", "final_layer_norm": "ln_final",
    "embeddings.position_embedding.weight": "positional_embedding", "encoder.layers": "transformer.resblocks",
    "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}  # fmt: skip


def one_file(base: Path, file: Path, metadata: Mapping[str, str] | None = None, **more: Tensor) -> Path:
    """Writes the weights of a pipeline folder into one file, `more` tensors beside them."""
    is_xl = (base / "text_encoder_2").exists()
    tensors = unet(base / "unet") | vae(base / "vae")
    first = load_file(base / "text_encoder/model.safetensors")
    if is_xl:
        tensors |= _prefixed(first, "conditioner.embedders.0.transformer.text_model.")
        second = load_file(base / "text_encoder_2/model.safetensors")
        tensors |= _open_clip(second, "conditioner.embedders.1.model.")
    elif "v_prediction" in (base / "scheduler/scheduler_config.json").read_text():  # SD2
        tensors |= _open_clip(first, "cond_stage_model.model.")
    else:
        tensors |= _prefixed(first, "cond_stage_model.transformer.text_model.")
    save_file({k: v.contiguous() for k, v in (tensors | more).items()}, file, metadata=dict(metadata or {}))
    return file


def unet(folder: Path) -> Tensors:
    """A UNet's weights as `model.diffusion_model.*`."""
    layers = json.loads((folder / "config.json").read_text())["layers_per_block"] + 1
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    has_attention = {key.split(".attentions")[0] for key in weights if ".attentions." in key}
    return {f"model.diffusion_model.{_unet_name(k, layers, has_attention)}": v for k, v in weights.items()}


def _unet_name(name: str, layers: int, has_attention: set[str]) -> str:
    for new, old in _UNET.items():
        if name.startswith(f"{new}."):
            return _inner(f"{old}.{name[len(new) + 1 :]}")
    match = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", name)
    assert match, name
    side, block, kind, layer, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
    if kind == "downsamplers":
        return f"input_blocks.{(block + 1) * layers}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        place = 2 if f"up_blocks.{block}" in has_attention else 1
        return f"output_blocks.{block * layers + layers - 1}.{place}.{rest}"
    number = block * layers + layer + (1 if side == "down" else 0)
    return _inner(f"{'input' if side == 'down' else 'output'}_blocks.{number}.{int(kind == 'attentions')}.{rest}")


def _inner(name: str) -> str:
    """The names within a residual block."""
    head, _, rest = name.rpartition(".")
    start, _, last = head.rpartition(".")
    return f"{start}.{_RESNET[last]}.{rest}" if last in _RESNET and "transformer_blocks" not in name else name


def vae(folder: Path, prefix: str = "first_stage_model.") -> Tensors:
    """An autoencoder's weights as `first_stage_model.*`; an empty prefix as files with a VAE alone have them."""
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    last = len(json.loads((folder / "config.json").read_text())["block_out_channels"]) - 1
    found: Tensors = {}
    for key, value in weights.items():
        name = re.sub(r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2", key)
        name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
        name = re.sub(r"up_blocks\.(\d+)\.resnets\.(\d+)", lambda m: f"up.{last - int(m[1])}.block.{m[2]}", name)
        name = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{last - int(m[1])}.upsample", name)
        name = name.replace("mid_block.resnets.0", "mid.block_1").replace("mid_block.resnets.1", "mid.block_2")
        name = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        if "mid_block.attentions.0" in name:
            name = name.replace("mid_block.attentions.0", "mid.attn_1").replace("group_norm", "norm")
            for new, old in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")):
                name = name.replace(new, old)
            value = value[:, :, None, None] if value.ndim == 2 else value
        found[f"{prefix}{name}"] = value
    return found


def _prefixed(weights: Tensors, prefix: str) -> Tensors:
    return {f"{prefix}{key.removeprefix('text_model.')}": value for key, value in weights.items()}


def _open_clip(weights: Tensors, prefix: str) -> Tensors:
    found: Tensors = {}
    for key, value in weights.items():
        name = key.removeprefix("text_model.")
        if name == "text_projection.weight":
            found[f"{prefix}text_projection"] = value.T
        elif match := re.fullmatch(r"encoder\.layers\.(\d+)\.self_attn\.q_proj\.(weight|bias)", name):
            parts = [weights[key.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            found[f"{prefix}transformer.resblocks.{match[1]}.attn.in_proj_{match[2]}"] = torch.cat(parts)
        elif not re.search(r"self_attn\.[kv]_proj", name):
            for new, old in _OPEN_CLIP.items():
                name = name.replace(new, old)
            found[f"{prefix}{name}"] = value
    return found
