"""A layout whose image tokens join the text: the denoiser's own layers read them, and only the projector is trained."""

from __future__ import annotations

import torch
from torch import Tensor

from ip_adapter_trainer.layouts import LAYOUTS, Layout


@LAYOUTS.register("prefix")
class PrefixLayout(Layout):
    """Tokens after those of the text; files hold a projector and no layers."""

    families = ("sd", "sdxl", "pixart")
    variants = ("base", "plus", "full")

    def condition(self, text: dict[str, Tensor], tokens: Tensor) -> dict[str, Tensor]:
        """See `Layout.condition`: a context [B, L + N, D], and a mask [B, L + N] where there is one."""
        joined = {**text, "context": torch.cat([text["context"], tokens], 1)}
        if "mask" in text:
            joined["mask"] = torch.cat([text["mask"], text["mask"].new_ones(tokens.shape[:2])], 1)
        return joined
