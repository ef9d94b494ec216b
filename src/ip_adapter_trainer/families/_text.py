"""CLIP text encoding as the pipelines encode prompts, and a check for texts that the encoders cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ip_adapter_trainer.core.values import to_device


def run_text_encoder(tokenizer: Any, encoder: Any, texts: Sequence[str]) -> Any:
    """Return the encoder's output for B texts, with hidden states; each is cut or padded to the tokenizer's length.

    The padding mask is given only to encoders whose config asks for it, as in the pipelines. Nothing waits for the
    device.
    """
    length = tokenizer.model_max_length
    words = tokenizer(list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    masked = getattr(encoder.config, "use_attention_mask", False)
    mask = to_device(words.attention_mask, encoder.device) if masked else None
    return encoder(to_device(words.input_ids, encoder.device), attention_mask=mask, output_hidden_states=True)


class Reach:
    """The length of text that the encoders of a base model read.

    Attributes:
        tokens: number of tokens that all of them read, without the two that mark a text's start and end.
    """

    def __init__(self, tokenizers: Sequence[Any]) -> None:
        rooms = [(t.model_max_length - t.num_special_tokens_to_add(), t) for t in tokenizers]
        self.tokens = min(room for room, _ in rooms)
        # SDXL's two tokenizers have the same vocabulary and would tokenize alike.
        self._distinct = {(room, frozenset(t.get_vocab().items())): t for room, t in rooms}

    def surely_covers(self, text: str) -> bool:
        """Return True only if its length alone shows that no encoder cuts the text.

        An ASCII character is one byte: a token, a part of one, or white space, which is left out. Others can become
        several times as many bytes by NFC and lower case, with which tokenizers begin.
        """
        return text.isascii() and len(text) <= self.tokens

    def tokens_if_cut(self, texts: Sequence[str]) -> list[int]:
        """Return the number of tokens of each text that an encoder cuts; 0 for a text that all of them read whole."""
        found = [0] * len(texts)
        for (room, _), tokenizer in self._distinct.items():
            ids = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False).input_ids
            found = [max(known, len(one) if len(one) > room else 0) for known, one in zip(found, ids, strict=True)]
        return found
