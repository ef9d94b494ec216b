"""The work that is left: the images of this process's share of which the set lacks something; and reading them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL.Image import Image
from torch import Tensor

from ip_adapter_trainer.cache.config import CutConfig
from ip_adapter_trainer.cache.index import IMAGES, Record, name_key
from ip_adapter_trainer.cache.prepared import PreparedSet
from ip_adapter_trainer.cache.spec import CacheSpec, View, Views
from ip_adapter_trainer.feed.readers import Preprocess, framed
from ip_adapter_trainer.images import crop
from ip_adapter_trainer.images.decode import ImageFault
from ip_adapter_trainer.manifest.images import ImageFiles
from ip_adapter_trainer.manifest.manifest import Manifest
from ip_adapter_trainer.runtime.stopping import Poll
from ip_adapter_trainer.runtime.workers import Pool
from ip_adapter_trainer.storage.digests import digest

_CHUNK = 65536


@dataclass(frozen=True)
class Item:
    """One image, whatever the number of rows that name it."""

    name: str
    use: int  # what rows use it as: see `cache.spec`
    row: int  # the first that names it


@dataclass(frozen=True)
class ReadImage:
    """An image that was read, cut and preprocessed as far as the set lacks it, or the reason why it was not."""

    item: Item
    record: Record | None  # to be noted; None: what is known of it still holds
    pixels: tuple[tuple[Views, Tensor], ...] = ()  # [3, H, W] each, and what is wanted of them
    fault: ImageFault | None = None


def share_of(manifest: Manifest, spec: CacheSpec, rank: int, world: int) -> list[Item]:
    """Return the images that fall to one process; each falls to exactly one, by its name."""
    found: dict[str, tuple[int, int]] = {}
    for number, row in enumerate(manifest.rows):
        for name, use in spec.uses(row):
            if world == 1 or int.from_bytes(name_key(name)[:8], "little") % world == rank:
                known, first = found.get(name, (0, number))
                found[name] = (known | use, first)
    return [Item(name, use, first) for name, (use, first) in found.items()]


def missing(items: list[Item], prepared: PreparedSet, images: ImageFiles) -> tuple[list[Item], int]:
    """Return the images that have to be read, and the most bytes that their encodings take."""
    left: list[Item] = []
    need_bytes = 0
    for start in range(0, len(items), _CHUNK):
        chunk = items[start : start + _CHUNK]
        places = prepared.index.places([item.name for item in chunk])
        there = prepared.all_there(places, np.array([item.use for item in chunk])).tolist()
        for item, record, is_there in zip(chunk, prepared.index.records(places), there, strict=True):
            if not (is_there and record is not None and _still_holds(record, item.name, images)):
                left.append(item)
                need_bytes += IMAGES.row_bytes
                if not is_there:  # of unknown size it is taken for a square
                    size_px = record.size_px if record is not None and record.is_sound else (1, 1)
                    need_bytes += sum(view.kind.row_bytes for view in prepared.spec.views(b"", size_px, item.use))
    return left, need_bytes


def _still_holds(record: Record, name: str, images: ImageFiles) -> bool:
    """Return whether an image need not be read again; one that is gone from the disk keeps its encodings."""
    try:
        status = images.stat(name)
    except ImageFault:
        return False
    return record.is_sound and (status is None or record.fits(status))


class MissingReader:
    """Reads, cuts and preprocesses images as far as the set lacks them; data workers call it."""

    def __init__(
        self, prepared: PreparedSet, images: ImageFiles, config: CutConfig, preprocess: Mapping[str, Preprocess]
    ) -> None:
        self._prepared, self._images, self._config, self._preprocess = prepared, images, config, preprocess

    def read(self, item: Item) -> ReadImage:
        """Return what was read of one image, or the fault for which it cannot be read."""
        known = self._prepared.index.find([item.name])[0]
        try:
            return self._read(item, known)
        except ImageFault as error:
            moved_without = error.fault.kind == "missing_file" and known is not None and known.is_sound
            is_known = known is not None and not known.is_sound
            return ReadImage(item, None if moved_without or is_known else Record.unreadable(), fault=error)

    def _read(self, item: Item, known: Record | None) -> ReadImage:
        content, status = self._images.read_file(item.name)
        key, image = digest(content), self._images.decode(content).image
        record = Record.of(status, (image.height, image.width), key)
        views = self._prepared.spec.views(key, record.size_px, item.use)
        lacking = [v for v in views if self._prepared.tables[v.kind].find([v.key])[0] < 0]
        sides = {mirrored: crop.mirror(image) if mirrored else image for mirrored in {v.mirrored for v in lacking}}
        alike: dict[tuple[object, bool, str], list[View]] = {}
        for view in lacking:
            alike.setdefault((view.target_px, view.mirrored, view.role), []).append(view)
        pixels = tuple((tuple(views), self._pixels(views[0], sides[views[0].mirrored])) for views in alike.values())
        still_holds = known is not None and known.content == key and known.fits(status)
        return ReadImage(item, None if still_holds else record, pixels)

    def _pixels(self, view: View, image: Image) -> Tensor:
        if view.target_px is not None:
            return crop.to_tensor(crop.fit(image, view.target_px)[0])
        return self._preprocess[view.role](framed(image, self._config, self._images))


def read_all(
    items: Sequence[Item], reader: MissingReader, config: CutConfig, where: Callable[[int], str], poll: Poll
) -> Iterator[ReadImage]:
    """Read every item in order, by data workers, or by this process if there are none.

    Faults name the place `where` of a row by its number; `poll` is called while an item is waited for.

    Raises:
        DataProblem: workers are lost over one image again and again.
    """
    pool = Pool(
        reader.read,
        where=lambda item: f"{where(item.row)}: {item.name!r}",
        workers=config.dataloader_num_workers or 0,
        timeout_s=config.data_timeout_s,
        poll=poll,
    )
    return pool.values(items)
