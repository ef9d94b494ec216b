"""The CLIP model that scores: both towers, embeddings of unit length. Not the adapter's own image encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ip_adapter_trainer.loading.encoder import load_scorer

if TYPE_CHECKING:
    from PIL.Image import Image


class ClipScorer:
    """A frozen `CLIPModel` in fp32 with its own tokenizer and preprocessing."""

    def __init__(self, model: Any, tokenizer: Any, processor: Any) -> None:
        self._model, self._tokenizer, self._processor = model, tokenizer, processor

    @classmethod
    def load(cls, path: str, device: torch.device) -> ClipScorer:
        """Loads a folder or hub id.

        Raises:
            Problem: no CLIP model, tokenizer and preprocessing there.
        """
        model, tokenizer, processor = load_scorer(path)
        return cls(model.to(device), tokenizer, processor)

    @torch.no_grad()
    def images(self, pictures: Sequence[Image]) -> Tensor:
        """Embeddings [B, E] of RGB pictures."""
        pixels = self._processor(images=list(pictures), return_tensors="pt")["pixel_values"]
        features = self._model.get_image_features(pixels.to(self._model.device)).pooler_output
        return normalize(features, dim=-1).cpu()

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Embeddings [B, E] of texts, of which no more is read than the model has positions for."""
        length = self._model.config.text_config.max_position_embeddings
        words = self._tokenizer(list(texts), padding=True, truncation=True, max_length=length, return_tensors="pt")
        features = self._model.get_text_features(**words.to(self._model.device)).pooler_output
        return normalize(features, dim=-1).cpu()


def clip_i(pictures: Tensor, references: Tensor) -> Tensor:
    """CLIP-I [...]: cosine of embeddings [..., E] of unit length."""
    return (pictures * references).sum(-1)


def clip_t(pictures: Tensor, texts: Tensor) -> Tensor:
    """CLIP-T [...]: CLIPScore, 2.5 max(cosine, 0) (Hessel et al. 2104.08718, section 3), without a prefix."""
    return 2.5 * (pictures * texts).sum(-1).clamp(min=0)
