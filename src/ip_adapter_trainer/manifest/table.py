"""A million rows in little memory: their strings end to end as UTF-8, and where each ends."""

from __future__ import annotations

import json
from array import array
from collections.abc import Sequence
from typing import overload

from ip_adapter_trainer.core.values import Row

# Of a row: image file, text, prompt image file. A prompt image of None is kept as an empty string, which no path is;
# several captions as a JSON array, whose end is kept as the negative number ~end.
_FIELDS = 3


class RowTable(Sequence[Row]):
    """Rows made on demand, 24 bytes each beside their text.

    Forked data workers share the memory: there is no object per row whose reference count would unshare a page.
    """

    def __init__(self) -> None:
        self._text = bytearray()
        self._ends = array("q", [0])  # where each string ends, after a first one of no length

    def append(self, row: Row) -> None:
        """Add a row, whose strings hold no lone surrogates and whose prompt image is not named by an empty string."""
        text, ends = self._text, self._ends
        text += row.image_file.encode()
        ends.append(len(text))
        if isinstance(row.text, str):
            text += row.text.encode()
            ends.append(len(text))
        else:
            text += json.dumps(row.text, ensure_ascii=False).encode()
            ends.append(~len(text))
        if row.prompt_image_file is not None:
            text += row.prompt_image_file.encode()
        ends.append(len(text))

    def __len__(self) -> int:
        return len(self._ends) // _FIELDS

    @overload
    def __getitem__(self, number: int) -> Row: ...
    @overload
    def __getitem__(self, number: slice) -> list[Row]: ...
    def __getitem__(self, number: int | slice) -> Row | list[Row]:
        numbers = range(len(self))[number]
        return self._row(numbers) if isinstance(numbers, int) else [self._row(one) for one in numbers]

    def _row(self, number: int) -> Row:
        ends, text = self._ends, self._text
        start, image, words, prompt = ends[_FIELDS * number : _FIELDS * number + _FIELDS + 1]
        is_one, words = words >= 0, max(words, ~words)
        own = text[words:prompt].decode() if prompt > words else None
        said = text[image:words].decode()
        return Row(text[start:image].decode(), said if is_one else tuple(json.loads(said)), own)
