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
        self._length: int = model.config.text_config.max_position_embeddings  # tokens of a text, both ends included

    @classmethod
    def load(cls, path: str, device: torch.device) -> ClipScorer:
        """Load the scoring model of a folder or hub id.

        Raises:
            Problem: no CLIP model, tokenizer and preprocessing there.
        """
        model, tokenizer, processor = load_scorer(path)
        return cls(model.to(device), tokenizer, processor)

    @torch.no_grad()
    def images(self, images: Sequence[Image]) -> Tensor:
        """Return embeddings [B, E] of RGB images."""
        pixels = self._processor(images=list(images), return_tensors="pt")["pixel_values"]
        features = self._model.get_image_features(pixels.to(self._model.device)).pooler_output
        return normalize(features, dim=-1).cpu()

    def cuts(self, texts: Sequence[str]) -> str:
        """Return a line that tells how many texts `texts` does not read whole; empty: none."""
        ids = self._tokenizer(list(texts), return_attention_mask=False, verbose=False).input_ids
        cut = sum(len(one) > self._length for one in ids)
        what = f"{cut:,} of {len(texts):,} captions at {self._length - 2} tokens (words or parts of words)"
        return f"the CLIP model cuts {what}: CLIP-T is that of their beginnings" if cut else ""

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Return embeddings [B, E] of texts, each read as far as the model has positions for."""
        words = self._tokenizer(
            list(texts), padding=True, truncation=True, max_length=self._length, return_tensors="pt"
        )
        features = self._model.get_text_features(**words.to(self._model.device)).pooler_output
        return normalize(features, dim=-1).cpu()


def clip_i(images: Tensor, references: Tensor) -> Tensor:
    """Return CLIP-I [...]: the cosine of embeddings [..., E] of unit length."""
    return (images * references).sum(-1)


def clip_t(images: Tensor, texts: Tensor) -> Tensor:
    """Return CLIP-T [...] of embeddings [..., E]: CLIPScore, 2.5 max(cosine, 0), without a prefix.

    See Hessel et al. 2104.08718, section 3.
    """
    return 2.5 * (images * texts).sum(-1).clamp(min=0)
