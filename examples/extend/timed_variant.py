"""A variant whose tokens depend on the time of the forward pass, and which leaves the time out now and then."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn

from ip_adapter_trainer.adapters import IMAGE, VARIANTS, Shapes, Variant
from ip_adapter_trainer.core.settings import Part
from ip_adapter_trainer.core.values import ImageTokens, Need
from ip_adapter_trainer.layouts import Reader

TOKENS, TIME = 4, 32


class TimedProjection(nn.Module):
    """One embedding and the time's to four tokens."""

    def __init__(self, feature_dim: int, token_dim: int) -> None:
        super().__init__()
        self.image, self.time = nn.Linear(feature_dim, TOKENS * token_dim), nn.Linear(TIME, TOKENS * token_dim)

    def forward(self, features: Tensor, time: Tensor, kept: Tensor) -> Tensor:
        """Features [B, E], times [B] and whether the time is told [B] to tokens [B, N, D]."""
        told = self.time(get_timestep_embedding(time, TIME).to(features.dtype)) * kept[:, None]
        return (self.image(features) + told).unflatten(-1, (TOKENS, -1))


@VARIANTS.register("timed")
class Timed(Variant):
    """Pooled embedding and time to four tokens; the time is left out for a tenth of the images."""

    Config = Part
    needs = (Need(IMAGE, "image_embeds"),)
    layouts = ("gated",)
    drops = {"time": 0.1}  # noqa: RUF012
    reads_time = True

    @classmethod
    def projector(cls, config: Part, shapes: Mapping[Need, tuple[int, ...]], token_dim: int) -> nn.Module:
        """See `Variant.projector`."""
        return TimedProjection(shapes[cls.needs[0]][-1], token_dim)

    @classmethod
    def tokens(cls, projector: Any, features: Any, time: Any = None, dropped: Any = None) -> ImageTokens:
        """See `Variant.tokens`: [B, N, D]."""
        kept = 1 - dropped["time"].to(time.device).float() if dropped else torch.ones_like(time, dtype=torch.float32)
        return ImageTokens(projector(features[cls.needs[0]], time, kept))

    @classmethod
    def owns(cls, shapes: Shapes) -> bool:
        """See `Variant.owns`."""
        return {"image.weight", "time.weight"} <= shapes.keys()

    @classmethod
    def facts(cls, shapes: Shapes) -> dict[str, int]:
        """See `Variant.facts`."""
        rows, feature_dim = shapes["image.weight"]
        return {"num_tokens": TOKENS, "feature_dim": feature_dim, "context_dim": rows // TOKENS}

    @classmethod
    def refusals(cls, shapes: Shapes) -> dict[Reader, str]:
        """See `Variant.refusals`; its layout says it of all readers."""
        return {}
