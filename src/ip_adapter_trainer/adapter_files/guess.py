"""Guesses from shapes alone: base model, image encoder, and kinds of adapter that this trainer does not train."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from ip_adapter_trainer.adapters import Shapes
from ip_adapter_trainer.layouts import Reader
from ip_adapter_trainer.layouts.unet import SDXL_CONTEXT

_SD_WIDTHS = [320] * 2 + [640] * 2 + [1280] * 2 + [1280] * 3 + [640] * 3 + [320] * 3 + [1280]
_SDXL_WIDTHS = [640] * 4 + [1280] * 20 + [1280] * 30 + [640] * 6 + [1280] * 10
_BASES = {768: ("SD1.x", _SD_WIDTHS), 1024: ("SD2.x", _SD_WIDTHS), SDXL_CONTEXT: ("SDXL", _SDXL_WIDTHS)}

_ENCODERS = {
    "image_embeds": {
        512: "CLIP ViT-B", 768: "CLIP ViT-L/14", 1024: "CLIP ViT-H/14 (laion2B-s32B-b79K)",
        1280: "CLIP ViT-bigG/14 (laion2B-39B-b160k)",
    },
    "penultimate": {
        768: "CLIP ViT-B", 1024: "CLIP ViT-L/14", 1280: "CLIP ViT-H/14 (laion2B-s32B-b79K)",
        1664: "CLIP ViT-bigG/14 (laion2B-39B-b160k)",
    },
}  # fmt: skip
# A resampler over an ArcFace embedding: 512 wide, for SDXL. A Plus adapter with another encoder has other shapes.
_FACE_RESAMPLER = {
    "image_proj.latents": (1, 16, 1280), "image_proj.proj_in.weight": (1280, 512),
    "image_proj.proj_out.weight": (SDXL_CONTEXT, 1280),
}  # fmt: skip
# Other names of the two tables, and the published ones.
_OTHER_NAMES = {
    "adapter_modules.": "ip_adapter.", "image_proj_model.": "image_proj.", "ip_adapter_proj_model.": "image_proj.",
}  # fmt: skip


def base_guess(context_dim: int, widths: Sequence[int]) -> str:
    """Return the base model that an adapter was made for, by the widths of tokens and layers, and how certain it is."""
    name, known = _BASES.get(context_dim, ("", []))
    if name and list(widths) == known:
        return f"{name} (certain: {len(known)} layers of its widths, tokens {context_dim} wide)"
    if name and len(widths) == len(known):
        return f"{name} (likely: {len(known)} layers, tokens {context_dim} wide, but other widths)"
    return f"unknown ({len(widths)} layers, tokens {context_dim} wide)"


def encoder_guess(feature: str, feature_dim: int) -> str:
    """Return the image encoder whose feature has this width, among those that published adapters use."""
    name = _ENCODERS.get(feature, {}).get(feature_dim)
    return f"{f'likely {name}' if name else 'unknown'} ({feature}, {feature_dim} wide)"


@dataclass(frozen=True)
class Foreign:
    """A kind of adapter that is recognised but not trained here."""

    name: str
    refusals: Mapping[Reader, str] = field(default_factory=dict)
    remark: str = ""
    is_unnorm: bool = False  # ComfyUI must find "unnorm" in its path, and takes no other kind that has it


_FLUX_ONLY: Mapping[Reader, str] = {"original": "has no FLUX adapter", "comfy": "has no FLUX adapter"}
_SD3_ONLY: Mapping[Reader, str] = {"original": "has no SD3 adapter", "comfy": "has no SD3 adapter"}
_NO_KOLORS: Mapping[Reader, str] = {
    "diffusers": "computes 4 tokens, the file makes 6", "original": "has no Kolors adapter",
}  # fmt: skip


def _has(shapes: Shapes, part: str) -> bool:
    return any(part in name for name in shapes)


_KINDS: tuple[tuple[Callable[[Shapes], bool], Foreign], ...] = (
    (lambda s: _has(s, "ip_adapter_double_stream_"), Foreign("FLUX, XLabs", _FLUX_ONLY)),
    (lambda s: "ip_adapter.0.to_k_ip.bias" in s, Foreign("FLUX, XLabs in diffusers' layout", _FLUX_ONLY)),
    (lambda s: "image_proj.time_embedding.linear_1.weight" in s, Foreign("SD3.5, InstantX", _SD3_ONLY)),
    (
        lambda s: "ip_adapter.0.to_k_ip.weight" in s,
        Foreign("FLUX, InstantX", {**_FLUX_ONLY, "diffusers": "wants biases, and 4 or 16 tokens of one layer"}),
    ),
    (
        lambda s: s.get("image_proj.perceiver_resampler.layers.0.0.to_out.weight", (0,))[0] == 4096,
        Foreign("Kolors FaceID-Plus", _NO_KOLORS),
    ),
    (
        lambda s: _has(s, "image_proj.perceiver_resampler."),
        Foreign("FaceID-Plus", remark="PlusV2 has the same tensors: ComfyUI tells it by 'plusv2' in the file's path"),
    ),
    (
        lambda s: _has(s, ".to_q_lora."),
        Foreign("FaceID", remark="diffusers needs peft for its LoRA, ComfyUI wants the LoRA in a file of its own"),
    ),
    (lambda s: {"image_proj.proj.2.weight", "image_proj.norm.weight"} <= s.keys(), Foreign("FaceID-Portrait")),
    (
        lambda s: s.items() >= _FACE_RESAMPLER.items(),
        Foreign("InstantID, or Portrait of un-normalised embeddings", {"original": "has no such class"}, "", True),
    ),
)


def published_name(name: str) -> str:
    """Return the published name of a tensor of the projector or of an adapted layer."""
    for other, published in _OTHER_NAMES.items():
        if name.startswith(other):
            return published + name.removeprefix(other)
    return name


def foreign_kind(shapes: Shapes) -> Foreign | None:
    """Return the kind of an adapter that is not trained here; None for all others. Shapes by published names."""
    return next((kind for matches, kind in _KINDS if matches(shapes)), None)


def tokens_guess(shapes: Shapes) -> int | None:
    """Return the number of tokens that a projector makes; None if no shape tells it. Shapes by published names."""
    if "image_proj.latents" in shapes:
        return shapes["image_proj.latents"][-2]
    for projection in ("image_proj.proj.weight", "image_proj.proj.2.weight"):
        if projection in shapes and "image_proj.norm.weight" in shapes:
            return shapes[projection][0] // shapes["image_proj.norm.weight"][0]
    return None
