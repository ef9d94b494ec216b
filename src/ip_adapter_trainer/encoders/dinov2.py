"""DINOv2 (arXiv 2304.07193), with and without registers (arXiv 2309.16588)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ip_adapter_trainer.encoders._encoder import ENCODERS, ImageEncoder, folder_preprocess

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn


@ENCODERS.register("dinov2")
class DinoEncoder(ImageEncoder):
    """A `Dinov2Model`: CLS and every patch; its embedding is CLS after the last norm."""

    known_as = ("dinov2",)
    model_class = "Dinov2Model"

    def make_preprocess(self, folder: Path) -> Any:
        """See `ImageEncoder.make_preprocess`; as the folder's own settings say, position embeddings interpolate."""
        return folder_preprocess(folder, self)

    @property
    def features(self) -> Mapping[str, tuple[int, ...]]:
        """See `ImageEncoder.features`; registers stand between CLS and the patches."""
        width = int(self.model.config.hidden_size)
        special = 1 + int(getattr(self.model.config, "num_register_tokens", 0))
        return {"image_embeds": (width,), "penultimate": (special + self.patches, width)}

    @property
    def last_layer(self) -> nn.Module:
        """See `ImageEncoder.last_layer`."""
        return self.model.encoder.layer[-1]


@ENCODERS.register("dinov2_with_registers")
class DinoRegistersEncoder(DinoEncoder):
    """The same with register tokens."""

    known_as = ("dinov2_with_registers",)
    model_class = "Dinov2WithRegistersModel"
