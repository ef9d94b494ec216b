"""The full-feature adapter: an MLP on every patch, no compression (`ip-adapter-full-face_sd15`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pydantic import Field

from ip_adapter_trainer.adapters._variant import IMAGE, VARIANTS, Shapes, Variant
from ip_adapter_trainer.core.errors import Problem
from ip_adapter_trainer.core.settings import Part, Resume
from ip_adapter_trainer.core.values import Need
from ip_adapter_trainer.layouts import Reader
from ip_adapter_trainer.layouts.unet import SDXL_CONTEXT

if TYPE_CHECKING:
    from torch import nn


class FullConfig(Part):
    """Settings of the Full variant."""

    resume = Resume(of_state="num_tokens")

    num_tokens: int | None = Field(None, gt=0, description="Image tokens; given by the encoder: CLS and every patch.")


@VARIANTS.register("full")
class Full(Variant):
    """Penultimate CLIP features, each projected to one token: CLS and every patch."""

    Config = FullConfig
    needs = (Need(IMAGE, "penultimate"),)

    @classmethod
    def projector(cls, config: Part, shapes: Mapping[Need, tuple[int, ...]], token_dim: int) -> nn.Module:
        """See `Variant.projector`."""
        from ip_adapter_trainer.nn.projections import FullProjection

        assert isinstance(config, FullConfig)
        feature_length, feature_dim = shapes[cls.needs[0]]
        if config.num_tokens not in (None, feature_length):
            what = f"the full variant makes one token a feature: {feature_length}, not {config.num_tokens}"
            remedy = "leave it out, or take --variant plus to choose the number of tokens"
            raise Problem(what, where="--num_tokens", remedy=remedy)
        return FullProjection(feature_dim, token_dim)

    @classmethod
    def owns(cls, shapes: Shapes) -> bool:
        """See `Variant.owns`: an MLP that ends with a norm."""
        return "proj.3.weight" in shapes

    @classmethod
    def facts(cls, shapes: Shapes) -> dict[str, int]:
        """See `Variant.facts`; the image encoder decides the number of tokens, which no tensor tells."""
        return {"feature_dim": shapes["proj.0.weight"][1], "context_dim": shapes["proj.3.weight"][0]}

    @classmethod
    def refusals(cls, shapes: Shapes) -> dict[Reader, str]:
        """See `Variant.refusals`: only diffusers has this variant for SDXL; no reader fixes the number of tokens."""
        if cls.facts(shapes)["context_dim"] != SDXL_CONTEXT:
            return {}
        return {"original": "has no Full adapter for SDXL", "comfy": "builds SDXL's Full projector 1280 wide, not 2048"}
