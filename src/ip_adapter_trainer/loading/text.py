"""Tokenizers: whole, and of the text encoder that they feed.

transformers makes a tokenizer of any folder, of an empty one too; what it lacks is told by what it does with words.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ip_adapter_trainer.core.errors import Problem, as_load_problem

_SPARE_WORDS = 0.01  # embeddings beyond the vocabulary: some models pad their number
_SAMPLE = 32
_OLD_END = 2  # what early settings of CLIP's text encoder say, whatever the token is
_REMEDY = "copy or download the folder again: tokenizer_config.json, and vocab.json with merges.txt or tokenizer.json"


def load_tokenizer(folder: Path, encoder: Mapping[str, Any], part: str, kind: Any = None) -> Any:
    """Load a tokenizer of some class, CLIP's by default, beside the settings of its text encoder.

    Raises:
        Problem: words or merges are missing, or they are another encoder's.
    """
    from transformers import CLIPTokenizer

    with as_load_problem(part, str(folder), _REMEDY):
        if not folder.is_dir():
            raise FileNotFoundError("no such folder")
        tokenizer: Any = (kind or CLIPTokenizer).from_pretrained(str(folder))
    if fault := _fault(tokenizer, encoder):
        raise Problem(f"{part} {fault}", where=str(folder), remedy=_REMEDY)
    return tokenizer


def _fault(tokenizer: Any, encoder: Mapping[str, Any]) -> str:
    """Return what is wrong with a tokenizer beside an encoder of such settings; empty: nothing."""
    is_clip = "clip" in str(encoder.get("model_type", "clip"))
    words = encoder.get("vocab_size", 49408)
    positions = encoder.get("max_position_embeddings", 77 if is_clip else 10**6)
    found, end = len(tokenizer), encoder.get("eos_token_id")
    if not isinstance(words, int) or not isinstance(positions, int):
        return f"belongs to a text encoder whose settings say vocab_size {words}, max_position_embeddings {positions}"
    if not words * (1 - _SPARE_WORDS) <= found <= words:
        return f"has {found:,} words, the text encoder {words:,}"
    if end not in (None, _OLD_END) and end != tokenizer.eos_token_id:
        return f"ends texts with token {tokenizer.eos_token_id}, the text encoder with token {end}: it is another one's"
    if tokenizer.model_max_length > 10**6:
        return "does not say how long texts may be: its tokenizer_config.json is missing or says no model_max_length"
    if tokenizer.model_max_length > positions:
        return f"reads texts of {tokenizer.model_max_length:,} tokens, the text encoder of {positions}"
    vocabulary = tokenizer.get_vocab()
    whole = sorted(word for word in vocabulary if re.fullmatch(r"[a-z]{3,}</w>", word))
    sample = whole[:: max(1, len(whole) // _SAMPLE)]
    one = [tokenizer(word.removesuffix("</w>"), add_special_tokens=False).input_ids for word in sample]
    right = sum(ids == [vocabulary[word]] for ids, word in zip(one, sample, strict=True))
    return "" if 2 * right >= len(sample) else "takes words apart into letters: its merges are missing"
