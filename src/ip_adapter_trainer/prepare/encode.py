"""Pixels to rows of tables: gathered into batches of one size, run through the frozen encoders, written down.

Every batch has the same number of pictures, the last one filled up with its first: what is written then depends
neither on how the work was shared nor on where a run was broken off.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ip_adapter_trainer.cache.index import PICTURES, Record, name_key
from ip_adapter_trainer.cache.shards import TableKind, TableWriter
from ip_adapter_trainer.cache.spec import Views
from ip_adapter_trainer.core.errors import NotFiniteProblem
from ip_adapter_trainer.encoders import FEATURES, ClipImageEncoder
from ip_adapter_trainer.families import Family

Encode = Callable[[Tensor, Sequence[str]], Mapping[str, Tensor]]  # pixels [B, 3, H, W]; [B, ...] for each table's name
Size = tuple[int, int]
Kinds = tuple[TableKind, ...]  # tables that one pass of an encoder fills


def encode_with(family: Family, encoder: ClipImageEncoder) -> Encode:
    """What fills the tables: the autoencoder the moments, the image encoder all features at once."""
    return partial(_encode, family, encoder)


def _encode(family: Family, encoder: ClipImageEncoder, pixels: Tensor, names: Sequence[str]) -> Mapping[str, Tensor]:
    if "moments" in names:
        return {"moments": family.encode_moments(pixels)}
    return encoder.encode_each(pixels, [kind for kind in FEATURES if kind in names])


class Encoding:
    """Takes pixels as they come and leaves a prepared set.

    Usage::

        encoding = Encoding(folder, encode_with(family, encoder), batch_images=8)
        encoding.take(views, pixels)
        encoding.finish()
        encoding.seal()

    Attributes:
        encoded: pictures that went through an encoder, counted each time.
    """

    def __init__(self, root: Path, encode: Encode, batch_images: int) -> None:
        self._root, self._encode_with, self._batch_images = root, encode, batch_images
        self._writers: dict[TableKind, TableWriter] = {}
        self._waiting: dict[tuple[Kinds, Size | None], list[tuple[Views, Tensor]]] = {}
        self.encoded = 0

    def note(self, name: str, record: Record) -> None:
        """Writes down what is known of a picture."""
        self._writer(PICTURES).add(name_key(name), record.packed())

    def take(self, views: Views, pixels: Tensor) -> None:
        """Encodes [3, H, W] once there are enough of its size; the views are what is wanted of these pixels."""
        kinds = tuple(view.kind for view in views)
        waiting = self._waiting.setdefault((kinds, views[0].target_px), [])
        waiting.append((views, pixels))
        if len(waiting) == self._batch_images:
            self._encode(kinds, waiting)
            waiting.clear()

    def finish(self) -> None:
        """Encodes what still waits for company."""
        for (kinds, _), waiting in self._waiting.items():
            if waiting:
                self._encode(kinds, waiting)
        self._waiting.clear()

    def seal(self) -> None:
        """Writes down what was encoded so far."""
        for writer in self._writers.values():
            writer.seal()

    def _encode(self, kinds: Kinds, waiting: list[tuple[Views, Tensor]]) -> None:
        filled = [pixels for _, pixels in waiting] + [waiting[0][1]] * (self._batch_images - len(waiting))
        made = self._encode_with(torch.stack(filled), [kind.name for kind in kinds])
        for number, kind in enumerate(kinds):
            self.keep(kind, [views[number].key for views, _ in waiting], made[kind.name][: len(waiting)])
        self.encoded += len(waiting)

    def keep(self, kind: TableKind, keys: Sequence[bytes], values: Tensor) -> None:
        """Adds values [B, ...] to a table.

        Raises:
            NotFiniteProblem: some are not finite.
        """
        values = values.cpu()
        if not bool(torch.isfinite(values).all()):
            what = f"an encoder gave {kind.name} that are not finite in {kind.dtype}"
            raise NotFiniteProblem(what, where="--mixed_precision", remedy="take bf16, or no")
        for key, value in zip(keys, values, strict=True):
            self._writer(kind).add(key, value)

    def _writer(self, kind: TableKind) -> TableWriter:
        if kind not in self._writers:
            self._writers[kind] = TableWriter(self._root, kind)
        return self._writers[kind]
