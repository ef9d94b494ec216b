"""The global adapter of the paper: one image embedding becomes four tokens (`ip-adapter_sd15`, `ip-adapter_sdxl`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pydantic import Field

from ip_adapter_trainer.adapters._variant import IMAGE, VARIANTS, Shapes, Variant
from ip_adapter_trainer.core.errors import Problem
from ip_adapter_trainer.core.settings import Part, Resume
from ip_adapter_trainer.core.values import Need
from ip_adapter_trainer.layouts import Reader

if TYPE_CHECKING:
    from torch import nn

TOKENS = 4  # fixed by diffusers and ComfyUI, which read it off no tensor


class BaseConfig(Part):
    """Settings of the base variant."""

    resume = Resume(of_state="num_tokens")

    num_tokens: int = Field(TOKENS, gt=0, description="Image tokens; diffusers and ComfyUI load exactly 4.")


@VARIANTS.register("base")
class Base(Variant):
    """A pooled CLIP embedding, projected to four tokens."""

    Config = BaseConfig
    needs = (Need(IMAGE, "image_embeds"),)

    @classmethod
    def projector(cls, config: Part, shapes: Mapping[Need, tuple[int, ...]], token_dim: int) -> nn.Module:
        """See `Variant.projector`."""
        from ip_adapter_trainer.nn.projections import ImageProjection

        assert isinstance(config, BaseConfig)
        if config.num_tokens != TOKENS:
            what = f"the base variant has {TOKENS} tokens in every loader, not {config.num_tokens}"
            remedy = "leave it at 4, or take --variant plus for another number of tokens"
            raise Problem(what, where="--num_tokens", remedy=remedy)
        return ImageProjection(shapes[cls.needs[0]][-1], token_dim, config.num_tokens)

    @classmethod
    def owns(cls, shapes: Shapes) -> bool:
        """See `Variant.owns`: a single `proj` layer and a norm."""
        return "proj.weight" in shapes and "norm.weight" in shapes

    @classmethod
    def facts(cls, shapes: Shapes) -> dict[str, int]:
        """See `Variant.facts`; the number of tokens follows from the norm's width."""
        rows, feature_dim = shapes["proj.weight"]
        context_dim = shapes["norm.weight"][0]
        return {"num_tokens": rows // context_dim, "feature_dim": feature_dim, "context_dim": context_dim}

    @classmethod
    def refusals(cls, shapes: Shapes) -> dict[Reader, str]:
        """See `Variant.refusals`: diffusers and ComfyUI divide the output of `proj` into four tokens."""
        tokens = cls.facts(shapes)["num_tokens"]
        if tokens == TOKENS:
            return {}
        why = f"reads {TOKENS} tokens from a base adapter, the file has {tokens}"
        return {"diffusers": why, "comfy": why}
