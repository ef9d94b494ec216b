"""An image encoder: ViT (arXiv 2010.11929), trained on labels, in CLIP's place."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ip_adapter_trainer.encoders import ENCODERS, ImageEncoder, folder_preprocess


@ENCODERS.register("vit")
class ViTEncoder(ImageEncoder):
    """A `ViTModel`: CLS and every patch; its embedding is CLS after the last norm."""

    known_as = ("vit",)  # `model_type` in config.json
    model_class = "ViTModel"  # of transformers

    def make_preprocess(self, folder: Path) -> Any:
        """See `ImageEncoder.make_preprocess`: as the folder's own preprocessor_config.json says."""
        return folder_preprocess(folder, self)

    @property
    def features(self) -> Mapping[str, tuple[int, ...]]:
        """See `ImageEncoder.features`."""
        width, side = int(self.model.config.hidden_size), self.side_px // int(self.model.config.patch_size)
        return {"image_embeds": (width,), "penultimate": (side**2 + 1, width)}

    @property
    def last_layer(self) -> nn.Module:
        """See `ImageEncoder.last_layer`."""
        return self.model.layers[-1]

    def embeds(self, output: Any) -> Tensor:
        """See `ImageEncoder.embeds`: [B, E]."""
        return output.last_hidden_state[:, 0]
