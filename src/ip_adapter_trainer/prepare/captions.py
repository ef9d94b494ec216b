"""Captions to rows of tables: each distinct one once, and the empty one that stands for dropped text."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ip_adapter_trainer.cache.prepared import PreparedSet
from ip_adapter_trainer.families import Codec
from ip_adapter_trainer.manifest.manifest import Manifest
from ip_adapter_trainer.prepare.encode import Encoding
from ip_adapter_trainer.storage.digests import digest

_CHUNK = 65536


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
