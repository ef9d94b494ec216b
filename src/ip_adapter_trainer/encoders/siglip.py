"""SigLIP (arXiv 2303.15343) and SigLIP 2 of fixed resolution (arXiv 2502.14786), which have the same architecture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ip_adapter_trainer.encoders._encoder import ENCODERS, ImageEncoder, folder_preprocess

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn


@ENCODERS.register("siglip")
class SiglipEncoder(ImageEncoder):
    """A `SiglipVisionModel`: no CLS; its embedding is what its attention pooling gives."""

    known_as = ("siglip_vision_model", "siglip")
    model_class = "SiglipVisionModel"
    spare = r"^text_model\."

    def make_preprocess(self, folder: Path) -> Any:
        """See `ImageEncoder.make_preprocess`; as the folder's own settings say."""
        return folder_preprocess(folder, self)

    @property
    def features(self) -> Mapping[str, tuple[int, ...]]:
        """See `ImageEncoder.features`."""
        width = int(self.model.config.hidden_size)
        return {"image_embeds": (width,), "penultimate": (self.patches, width)}

    @property
    def last_layer(self) -> nn.Module:
        """See `ImageEncoder.last_layer`."""
        return getattr(self.model, "vision_model", self.model).encoder.layers[-1]

    @classmethod
    def unread(cls, settings: Mapping[str, Any], names: Sequence[str], features: Sequence[str]) -> str | None:
        """See `ImageEncoder.unread`: the pooling head."""
        return None if "image_embeds" in features else r"^(vision_model\.)?(head|post_layernorm)\."
