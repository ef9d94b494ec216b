"""Checks of a UNet and its companions by their settings, before any weights are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ip_adapter_trainer.core.errors import Problem

Settings = Mapping[str, Mapping[str, Any]]

# Conditions that other pipelines feed their UNets and that no adapter file could describe.
_FOREIGN = (
    "class_embed_type", "num_class_embeds", "encoder_hid_dim", "encoder_hid_dim_type", "dual_cross_attention",
    "only_cross_attention",
)  # fmt: skip
_REMEDY = "take a text-to-image base model of plain SD1.x, SD2.x or SDXL"
_KINDS = {"9": " (inpainting)", "8": " (editing by instructions)", "7": " (upscaling)", "5": " (depth)"}


def demand_unet(settings: Settings, addition: str | None, where: str) -> None:
    """Demand a UNet of the plain kind, with this `addition_embed_type`, that its VAE and text encoders fit.

    Raises:
        Problem: it is of another kind, or something does not fit.
    """
    unet = settings.get("unet")
    if unet is None:
        return
    fault = _channels(unet, settings.get("vae", {})) or _conditions(unet, addition) or _widths(unet, settings)
    if fault:
        raise Problem(fault, where=where, remedy=_REMEDY)


def _channels(unet: Mapping[str, Any], vae: Mapping[str, Any]) -> str:
    for name, wanted in (("in_channels", 3), ("shift_factor", None)):
        found = vae.get(name, wanted)
        if found != wanted:
            return f"this VAE has {name} {found!r}, where {wanted!r} is needed"
    if not isinstance(vae.get("scaling_factor", 0.18215), (int, float)):
        return f"this VAE's scaling_factor is {vae['scaling_factor']!r}, and a number is needed"
    read, made, latent = unet.get("in_channels", 4), unet.get("out_channels", 4), vae.get("latent_channels", 4)
    if read != latent:
        return f"this UNet reads {read} channels{_KINDS.get(str(read), '')}, the latents have {latent}"
    return "" if made == latent else f"this UNet predicts {made} channels, the latents have {latent}"


def _conditions(unet: Mapping[str, Any], addition: str | None) -> str:
    for key in _FOREIGN:
        value = unet.get(key)
        if any(value) if isinstance(value, list) else value:
            return f"this UNet wants more than text: {key} is {value!r}"
    found = unet.get("addition_embed_type")
    return "" if found == addition else f"this UNet's addition_embed_type is {found!r}, where {addition!r} is needed"


def _widths(unet: Mapping[str, Any], settings: Settings) -> str:
    dim = unet.get("cross_attention_dim", 1280)
    if not isinstance(dim, int):
        return f"the UNet's cross_attention_dim is {dim}, one width for all blocks is needed"
    widths = [part.get("hidden_size", 512) for name, part in settings.items() if name.startswith("text_encoder")]
    if not all(isinstance(width, int) for width in widths):
        return f"the text encoder's hidden_size is no number: {widths}"
    if widths and sum(widths) != dim:
        return f"this UNet reads text of width {dim}, the text encoders give {' + '.join(map(str, widths))}"
    # SDXL reads the second text encoder's pooled text beside six numbers, so the two cannot change places.
    both, number = unet.get("projection_class_embeddings_input_dim"), unet.get("addition_time_embed_dim")
    second = settings.get("text_encoder_2", {})
    if not second or not isinstance(both, int) or not isinstance(number, int):
        return ""
    read, made = both - 6 * number, second.get("projection_dim", 512)
    return "" if read == made else f"this UNet reads pooled text of width {read}, its text_encoder_2 gives {made}"
