"""The fine-grained adapter: a perceiver resampler over every patch of the image (`ip-adapter-plus_sd15` and others)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, get_args

from pydantic import Field

from ip_adapter_trainer.adapters._variant import IMAGE, VARIANTS, Shapes, Variant
from ip_adapter_trainer.core.errors import Problem
from ip_adapter_trainer.core.settings import Part, Resume
from ip_adapter_trainer.core.values import Need
from ip_adapter_trainer.layouts import Reader
from ip_adapter_trainer.layouts.unet import SDXL_CONTEXT

if TYPE_CHECKING:
    from torch import nn

DEPTH, HEAD_DIM, EXPANSION = 4, 64, 4  # fixed in diffusers' loader, whatever the file holds
HEADS = 12  # of every base model but SDXL, in the original code and ComfyUI
TOKENS = 16  # in ComfyUI
SDXL_WIDTH, SDXL_HEADS = 1280, 20
KOLORS = (2048, 12)  # width and heads of its resampler; only ComfyUI takes it, on the layers of SDXL
EXTRAS = ("pos_emb.", "to_latents_from_mean_pooled_seq.")  # options of the original resampler that no reader turns on


class PlusConfig(Part):
    """Settings of the Plus variant; depth, head width and expansion exist to be refused with a reason."""

    resume = Resume(
        of_state="num_tokens resampler_dim resampler_heads resampler_depth resampler_head_dim resampler_ff_mult"
    )

    num_tokens: int = Field(TOKENS, gt=0, le=65536, description="Image tokens (learned queries of the resampler).")
    resampler_dim: int | None = Field(
        None, gt=0, le=65536, description="Width of the resampler; default: 1280 for SDXL, else the context width."
    )
    resampler_heads: int | None = Field(
        None,
        gt=0,
        le=1024,
        description="Attention heads of the resampler; default: 20 for SDXL, else 12, as readers build it.",
    )
    resampler_depth: int = Field(DEPTH, description="Layers of the resampler; every loader computes 4.")
    resampler_head_dim: int = Field(HEAD_DIM, description="Width of one attention head; diffusers infers heads by 64.")
    resampler_ff_mult: int = Field(EXPANSION, description="Expansion of the feed-forward layers; loaders build 4.")


@VARIANTS.register("plus")
class Plus(Variant):
    """Penultimate CLIP features, resampled to 16 (or any number of) tokens."""

    Config = PlusConfig
    needs = (Need(IMAGE, "penultimate"),)

    @classmethod
    def projector(cls, config: Part, shapes: Mapping[Need, tuple[int, ...]], token_dim: int) -> nn.Module:
        """See `Variant.projector`."""
        from ip_adapter_trainer.nn.projections import Resampler

        assert isinstance(config, PlusConfig)
        for name, fixed in (("depth", DEPTH), ("head_dim", HEAD_DIM), ("ff_mult", EXPANSION)):
            value = getattr(config, f"resampler_{name}")
            if value != fixed:
                what = f"resampler_{name} {value}: diffusers would load the file and compute it with {fixed}"
                raise Problem(what, where=f"--resampler_{name}", remedy=f"leave it at {fixed}")
        width, heads = _built(token_dim)
        return Resampler(
            shapes[cls.needs[0]][-1],
            token_dim,
            num_tokens=config.num_tokens,
            width=config.resampler_dim or width,
            heads=config.resampler_heads or heads,
            depth=config.resampler_depth,
            head_dim=config.resampler_head_dim,
            expansion=config.resampler_ff_mult,
        )

    @classmethod
    def owns(cls, shapes: Shapes) -> bool:
        """See `Variant.owns`: learned queries under `latents`, and an input projection."""
        return "latents" in shapes and "proj_in.weight" in shapes

    @classmethod
    def facts(cls, shapes: Shapes) -> dict[str, int]:
        """See `Variant.facts`; everything but the head width can be read off the shapes."""
        width, feature_dim = shapes["proj_in.weight"]
        return {
            "num_tokens": shapes["latents"][1],
            "feature_dim": feature_dim,
            "context_dim": shapes["proj_out.weight"][0],
            "resampler_dim": width,
            "resampler_depth": len({key.split(".")[1] for key in shapes if key.startswith("layers.")}),
            "resampler_heads": shapes["layers.0.0.to_q.weight"][0] // HEAD_DIM,
            "resampler_ff_mult": shapes["layers.0.1.1.weight"][0] // width,
        }

    @classmethod
    def refusals(cls, shapes: Shapes) -> dict[Reader, str]:
        """See `Variant.refusals`: all fix depth and expansion; some, width and heads; ComfyUI, also tokens."""
        facts = cls.facts(shapes)
        why: dict[Reader, str] = {}
        if any(name.startswith(EXTRAS) for name in shapes):
            reason = "has no position embedding or pooled latents in its resampler"
            why |= {"diffusers": f"{reason}, and would leave them out", "original": reason, "comfy": reason}
        for name, fixed in (("depth", DEPTH), ("ff_mult", EXPANSION)):
            if (value := facts[f"resampler_{name}"]) != fixed:
                why |= dict.fromkeys(get_args(Reader), f"computes a resampler of {name} {fixed}, the file has {value}")
        own = facts["resampler_dim"], facts["resampler_heads"]
        built = _built(facts["context_dim"])
        if own != built:
            reason = f"builds a resampler {built[0]} wide of {built[1]} heads, the file's is {own[0]} wide of {own[1]}"
            why.setdefault("original", reason)
            if facts["context_dim"] != SDXL_CONTEXT or own != KOLORS:
                why.setdefault("comfy", reason)
        if facts["num_tokens"] != TOKENS:
            why.setdefault("comfy", f"builds {TOKENS} tokens, the file has {facts['num_tokens']}")
        return why


def _built(context_dim: int) -> tuple[int, int]:
    """Return the width and heads with which the original code and ComfyUI build the resampler."""
    return (SDXL_WIDTH, SDXL_HEADS) if context_dim == SDXL_CONTEXT else (context_dim, HEADS)
