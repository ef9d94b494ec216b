"""Pixels to rows of tables: gathered into batches of one size, run through the frozen encoders, written down.

Every batch has the same number of pictures, the last one filled up with its first: what is written then depends
neither on how the work was shared nor on where a run was broken off.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ip_adapter_trainer.core.errors import NotFiniteProblem
from ip_adapter_trainer.data.index import PICTURES, Record, name_key
from ip_adapter_trainer.data.recipe import View
from ip_adapter_trainer.data.shards import TableKind, TableWriter
from ip_adapter_trainer.encoders import ClipImageEncoder
from ip_adapter_trainer.families import Family

Encode = Callable[[Tensor], Tensor]  # pixels [B, 3, H, W] to values [B, ...]
Size = tuple[int, int]


def encoders_of(family: Family, encoder: ClipImageEncoder) -> dict[str, Encode]:
    """What fills each table, by the table's name."""
    return {
        "moments": family.encode_moments,
        "image_embeds": lambda pixels: encoder.encode(pixels, "image_embeds"),
        "penultimate": lambda pixels: encoder.encode(pixels, "penultimate"),
    }


class Encoding:
    """Takes pixels as they come and leaves a prepared set.

    Usage::

        encoding = Encoding(folder, encoders_of(family, encoder), batch_images=8)
        encoding.take(view, pixels)
        encoding.finish()
        encoding.seal()

    Attributes:
        encoded: pictures that went through an encoder and were handed to a table.
    """

    def __init__(self, root: Path, encoders: Mapping[str, Encode], batch_images: int) -> None:
        self._root, self._encoders, self._batch_images = root, encoders, batch_images
        self._writers: dict[TableKind, TableWriter] = {}
        self._waiting: dict[tuple[TableKind, Size | None], list[tuple[View, NDArray[np.float32]]]] = {}
        self.encoded = 0

    def note(self, name: str, record: Record) -> None:
        """Writes down what is known of a picture."""
        self._writer(PICTURES).add(name_key(name), record.packed())

    def take(self, view: View, pixels: NDArray[np.float32]) -> None:
        """Encodes [3, H, W] once there are enough of its size."""
        waiting = self._waiting.setdefault((view.kind, view.target_px), [])
        waiting.append((view, pixels))
        if len(waiting) == self._batch_images:
            self._encode(view.kind, waiting)
            waiting.clear()

    def finish(self) -> None:
        """Encodes what still waits for company."""
        for (kind, _), waiting in self._waiting.items():
            if waiting:
                self._encode(kind, waiting)
        self._waiting.clear()

    def seal(self) -> None:
        """Writes down what was encoded so far."""
        for writer in self._writers.values():
            writer.seal()

    def _encode(self, kind: TableKind, waiting: list[tuple[View, NDArray[np.float32]]]) -> None:
        filled = [pixels for _, pixels in waiting] + [waiting[0][1]] * (self._batch_images - len(waiting))
        values = self._encoders[kind.name](torch.from_numpy(np.stack(filled)))[: len(waiting)].cpu()
        if not bool(torch.isfinite(values).all()):
            what = f"an encoder gave {kind.name} that are not finite in {kind.dtype}"
            raise NotFiniteProblem(what, where="--mixed_precision", remedy="take bf16, or no")
        for (view, _), value in zip(waiting, values, strict=True):
            self._writer(kind).add(view.key, value)
        self.encoded += len(waiting)

    def _writer(self, kind: TableKind) -> TableWriter:
        if kind not in self._writers:
            self._writers[kind] = TableWriter(self._root, kind)
        return self._writers[kind]
