"""Texts to a CLIP text encoder's outputs, as the pipelines encode prompts, without waiting for the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ip_adapter_trainer.core.devices import to_device


def run_text_encoder(tokenizer: Any, encoder: Any, texts: Sequence[str]) -> Any:
    """The encoder's output, hidden states included, for B texts, each cut or padded to the tokenizer's length L.

    The mask of padding is given only to encoders whose config asks for it, as the pipelines do.
    """
    length = tokenizer.model_max_length
    words = tokenizer(list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    masked = getattr(encoder.config, "use_attention_mask", False)
    mask = to_device(words.attention_mask, encoder.device) if masked else None
    return encoder(to_device(words.input_ids, encoder.device), attention_mask=mask, output_hidden_states=True)
