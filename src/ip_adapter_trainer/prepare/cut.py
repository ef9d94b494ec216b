"""Captions that the text encoders do not read whole: counted, and told before they are trained on."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ip_adapter_trainer.core.log import say
from ip_adapter_trainer.core.rng import stream
from ip_adapter_trainer.families import Reach
from ip_adapter_trainer.manifest.manifest import Manifest

_MOST = 50_000  # captions that are taken apart; a core does some 4,000 of 300 characters a second
_CHUNK = 1024


@dataclass(frozen=True)
class CutCaptions:
    """The captions that are too long, counted."""

    captions: int  # all but empty ones
    unsure: int  # those of them that may be too long, judged by their letters alone
    counted: int  # those of these whose tokens were counted: all, or a sample
    cut: int  # those of these that are too long
    tokens: int  # that the text encoders read of one
    longest: int  # the most tokens of one
    first: str  # where the first that is cut stands

    def __str__(self) -> str:
        of = f"{self.captions:,} captions"
        if self.counted < self.unsure:
            of = f"{self.counted:,} captions looked at, a sample of the {self.unsure:,} that may be too long,"
        told = f"{self.cut:,} of {of} are cut at {self.tokens} tokens (words or parts of words)"
        if not self.cut:
            return told
        remedy = "shorten them, or put what matters first"
        return f"{told}: the longest has {self.longest:,}, the first is {self.first}; {remedy}"


def cut_captions(manifest: Manifest, tokenizers: Sequence[Any]) -> CutCaptions:
    """Count the captions that are longer than the text encoders read; where very many may be, those of a sample."""
    rows, reach = manifest.rows, Reach(tokenizers)
    captions, numbers, places = 0, array("q"), array("q")  # of those that may be too long: row, place in its list
    for number, row in enumerate(rows):
        for place, caption in enumerate(row.captions):
            captions += caption != ""
            if not reach.surely_covers(caption):
                numbers.append(number)
                places.append(place)
    chosen: Sequence[int] = range(len(numbers))
    if len(numbers) > _MOST:
        chosen = sorted(stream(0, "caption-lengths").permutation(len(numbers))[:_MOST].tolist())
    lengths: list[int] = []
    for start in range(0, len(chosen), _CHUNK):
        part = [rows[numbers[one]].captions[places[one]] for one in chosen[start : start + _CHUNK]]
        lengths += reach.tokens_if_cut(part)
    cut = [numbers[one] for one, tokens in zip(chosen, lengths, strict=True) if tokens]
    first = manifest.where(cut[0]) if cut else ""
    return CutCaptions(captions, len(numbers), len(chosen), len(cut), reach.tokens, max(lengths, default=0), first)


def warn_of_cut_captions(manifest: Manifest, tokenizers: Sequence[Any]) -> None:
    """Say in one line how many captions are cut, if any is."""
    found = cut_captions(manifest, tokenizers)
    if found.cut:
        say(str(found))
