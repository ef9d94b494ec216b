"""Pixels to rows of tables: gathered into batches of one size, run through the frozen encoders, written down.

Every batch has the same number of images, the last one filled up with its first: what is written then depends
neither on how the work was shared nor on where a run was broken off.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ip_adapter_trainer.cache.index import IMAGES, Record, name_key
from ip_adapter_trainer.cache.prepared import PreparedSet
from ip_adapter_trainer.cache.shards import TableKind, TableWriter
from ip_adapter_trainer.cache.spec import Views
from ip_adapter_trainer.core.errors import NotFiniteProblem
from ip_adapter_trainer.core.values import Need, Size
from ip_adapter_trainer.encoders import ImageEncoder
from ip_adapter_trainer.families import Codec
from ip_adapter_trainer.manifest.manifest import Manifest
from ip_adapter_trainer.storage.digests import digest

Encode = Callable[[Tensor, str, Sequence[str]], Mapping[str, Tensor]]  # pixels, role, tables; [B, ...] for each table
_CHUNK = 65536  # captions looked for at once
Kinds = tuple[TableKind, ...]  # tables that one pass of an encoder fills


def encode_with(codec: Codec, encoders: Mapping[str, ImageEncoder]) -> Encode:
    """Return what fills the tables: the autoencoder the moments, an image encoder all its features at once."""

    def encode(pixels: Tensor, role: str, names: Sequence[str]) -> Mapping[str, Tensor]:
        """Return the rows [B, ...] of the tables of one role; the autoencoder's has no name."""
        if not role:
            return {"moments": codec.moments(pixels)}
        needs = {need.name: name for name in encoders[role].features if (need := Need(role, name)).name in names}
        found = encoders[role].encode(pixels, tuple(needs.values()))
        return {name: found[feature] for name, feature in needs.items()}

    return encode


class Encoding:
    """Takes pixels as they come and leaves a prepared set.

    Attributes:
        encoded: images that went through an encoder, counted each time.
    """

    def __init__(self, root: Path, encode: Encode, batch_images: int) -> None:
        self._root, self._encode_with, self._batch_images = root, encode, batch_images
        self._writers: dict[TableKind, TableWriter] = {}
        self._waiting: dict[tuple[str, Kinds, Size | None], list[tuple[Views, Tensor]]] = {}
        self.encoded = 0

    def note(self, name: str, record: Record) -> None:
        """Write down the record of an image."""
        self._writer(IMAGES).add(name_key(name), record.packed())

    def take(self, views: Views, pixels: Tensor) -> None:
        """Encode pixels [3, H, W] once there are enough of their size; the views say what is made of them."""
        role, kinds = views[0].role, tuple(view.kind for view in views)
        waiting = self._waiting.setdefault((role, kinds, views[0].target_px), [])
        waiting.append((views, pixels))
        if len(waiting) == self._batch_images:
            self._encode(role, kinds, waiting)
            waiting.clear()

    def finish(self) -> None:
        """Encode the pixels that still wait for others of their size."""
        for (role, kinds, _), waiting in self._waiting.items():
            if waiting:
                self._encode(role, kinds, waiting)
        self._waiting.clear()

    def seal(self) -> None:
        """Write down what was encoded so far."""
        for writer in self._writers.values():
            writer.seal()

    def _encode(self, role: str, kinds: Kinds, waiting: list[tuple[Views, Tensor]]) -> None:
        filled = [pixels for _, pixels in waiting] + [waiting[0][1]] * (self._batch_images - len(waiting))
        made = self._encode_with(torch.stack(filled), role, [kind.name for kind in kinds])
        for number, kind in enumerate(kinds):
            self.keep(kind, [views[number].key for views, _ in waiting], made[kind.name][: len(waiting)])
        self.encoded += len(waiting)

    def keep(self, kind: TableKind, keys: Sequence[bytes], values: Tensor) -> None:
        """Add values [B, ...] to a table.

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


def missing_captions(manifest: Manifest, prepared: PreparedSet, rank: int, world: int) -> list[str]:
    """Return the captions that the set lacks and that fall to this process; each falls to exactly one."""
    if prepared.spec.text is None:
        return []
    distinct = list(dict.fromkeys(["", *(caption for row in manifest.rows for caption in row.captions)]))
    if world > 1:
        distinct = [t for t in distinct if int.from_bytes(digest("caption", t)[:8], "little") % world == rank]
    chunks = [distinct[start : start + _CHUNK] for start in range(0, len(distinct), _CHUNK)]
    return [chunk[n] for chunk in chunks for n in np.flatnonzero(~prepared.captions_there(chunk)).tolist()]


def encode_captions(
    captions: list[str], codec: Codec, encoding: Encoding, prepared: PreparedSet, batch: int, poll: Callable[[], None]
) -> None:
    """Encode captions, `batch` at once; the last batch is filled up with its first caption, as that of images is."""
    spec = prepared.spec.text
    for start in range(0, len(captions), batch):
        poll()
        assert spec is not None, "captions are missing only where they are wanted"
        part = captions[start : start + batch]
        made = codec.text(part + [part[0]] * (batch - len(part)))
        for kind, keys in zip(spec.tables, spec.keys, strict=True):
            encoding.keep(kind, keys.of(text.encode() for text in part), made[kind.name][: len(part)])
