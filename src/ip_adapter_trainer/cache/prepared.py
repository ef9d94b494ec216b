"""A prepared set: the encodings of images and captions, looked up by what was encoded and how."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ip_adapter_trainer.cache.index import ImageIndex, Record
from ip_adapter_trainer.cache.shards import Table, TableKind
from ip_adapter_trainer.cache.spec import ALL_USES, CacheSpec
from ip_adapter_trainer.core.values import Encoded, Geometry, Row, Size
from ip_adapter_trainer.images import crop
from ip_adapter_trainer.images.decode import ImageFault, check_bytes, check_density, check_size
from ip_adapter_trainer.manifest.images import ImageFiles
from ip_adapter_trainer.storage.digests import digest

_AGAIN = "run `ip-adapter prepare` again"
_CHUNK_ROWS = 65536
_MAX_MAPS = 512  # shards mapped at a time over all tables, half the usual limit of open files


class Asked(NamedTuple):
    """A row, and the values that are wanted of it."""

    row: Row
    mirrored: bool
    text: str  # its caption, or none where that is dropped


class _Found(NamedTuple):
    """The keys of a row's values, and the cut of its target."""

    keys: tuple[bytes, ...]  # one for each table that a batch is filled from
    geometry: Geometry


class PreparedSet:
    """A set's tables as they were when it was opened; read by many processes, each with maps of its own.

    Raises:
        Problem: a damaged shard.
    """

    def __init__(self, root: Path, spec: CacheSpec, images: ImageFiles) -> None:
        self.root, self.spec, self._images = root, spec, images
        self.index = ImageIndex(root)
        kinds = spec.tables
        self.tables = {kind: Table(root, kind, max(1, _MAX_MAPS // len(kinds))) for kind in kinds}

    def sizes_px(self, rows: Sequence[Row]) -> list[Size | None]:
        """Return height and width of each row's target, None where its file must be asked."""
        found: list[Size | None] = []
        for start in range(0, len(rows), _CHUNK_ROWS):
            chunk = rows[start : start + _CHUNK_ROWS]
            records = self.index.find([row.image_file for row in chunk])
            found += [r.size_px if r is not None and r.is_sound and self._admits(r) else None for r in records]
        return found

    def lacking(self, rows: Sequence[Row], among: range) -> Iterator[int]:
        """Yield, of some row numbers without gaps, those of the rows for which the set lacks some value.

        Rows that are known to be faulty, or whose files are gone since they were encoded, are not among them.
        """
        for first in range(among.start, among.stop, _CHUNK_ROWS):
            chunk = rows[first : min(first + _CHUNK_ROWS, among.stop)]
            used = [(number, name, use) for number, row in enumerate(chunk) for name, use in self.spec.uses(row)]
            places = self.index.places([name for _, name, _ in used])
            there = self.all_there(places, np.array([use for _, _, use in used]))
            missing = {
                used[place][0]
                for place in np.flatnonzero(~there).tolist()
                if places[place] < 0 or self._images.stat(used[place][1]) is not None
            }
            said = [(number, caption) for number, row in enumerate(chunk) for caption in row.captions]
            captions = self.captions_there([caption for _, caption in said]) & self.captions_there([""])  # dropped text
            missing.update(said[place][0] for place in np.flatnonzero(~captions).tolist())
            yield from (first + number for number in sorted(missing))

    def captions_there(self, captions: Sequence[str]) -> NDArray[np.bool_]:
        """Return whether the set holds the encoding of each caption, [captions]; all True where it keeps no text."""
        there = np.ones(len(captions), np.bool_)
        if self.spec.text is not None:
            contents = [caption.encode() for caption in captions]
            for kind, keys in zip(self.spec.text.tables, self.spec.text.keys, strict=True):
                there &= self.tables[kind].find(keys.of(contents)) >= 0
        return there

    def all_there(self, places: NDArray[np.int64], uses: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return whether the set holds all that each use [images] of an image needs, [images]; faults need nothing.

        Images are given by their places in the index, [images], -1 for one that is not there.
        """
        there = places >= 0
        known = np.flatnonzero(there)
        buckets = self._buckets(self.index.sizes_px[places[known]])
        known, buckets = known[buckets >= 0], buckets[buckets >= 0]
        kinds = buckets * ALL_USES + uses[known]
        for kind in np.unique(kinds).tolist():
            group, (bucket, use) = known[kinds == kind], divmod(kind, ALL_USES)
            contents = self.index.contents[places[group]].tolist()
            for way in self.spec.ways(self.spec.buckets.sizes_px[bucket], use):
                there[group] &= self.tables[way.kind].find(way.keys.of(contents)) >= 0
        return there

    def _buckets(self, sizes_px: NDArray[np.uint32]) -> NDArray[np.int64]:
        """Return the bucket of each image by its size [images, 2], [images]; -1 for one that could not be read."""
        buckets = self.spec.buckets
        if len(buckets) == 1:
            return np.where(sizes_px[:, 0] > 0, 0, -1)
        distinct, which = np.unique(sizes_px[:, 0].astype(np.int64) << 32 | sizes_px[:, 1], return_inverse=True)
        numbers = [buckets.nearest((size >> 32, size & 0xFFFFFFFF)) if size else -1 for size in distinct.tolist()]
        return np.array(numbers, np.int64)[which]

    def room(self, count: int, target_px: Size) -> Encoded:
        """Return tensors for `count` rows of one size, with nothing in them yet."""
        moments, *others = (self.tables[kind].room(count) for kind in self._kinds(target_px))
        needs, names = list(self.spec.features), [kind.name for kind in self._text_kinds]
        features, text = others[: len(needs)], others[len(needs) :]
        return Encoded(moments, dict(zip(needs, features, strict=True)), dict(zip(names, text, strict=True)))

    @property
    def _text_kinds(self) -> tuple[TableKind, ...]:
        return self.spec.text.tables if self.spec.text else ()

    def _kinds(self, target_px: Size) -> tuple[TableKind, ...]:
        return self.spec.moments[target_px], *self.spec.features.values(), *self._text_kinds

    def read(
        self, asked: Sequence[Asked], target_px: Size, into: Encoded, slots: Sequence[int]
    ) -> list[Geometry | ImageFault]:
        """Copy the encoded values of rows into slots of a batch, and return how each row's target was cut.

        A row has a fault in place of its geometry, and nothing in its slot, if one of its images could not be read,
        changed since, or is not in the set.
        """
        found, stacks = self._found(asked, target_px), (into.moments, *into.features.values(), *into.text.values())
        for column, (kind, stack) in enumerate(zip(self._kinds(target_px), stacks, strict=True)):
            self._fill(self.tables[kind], column, found, stack, slots)
        return [one if isinstance(one, ImageFault) else one.geometry for one in found]

    def _found(self, asked: Sequence[Asked], target_px: Size) -> list[_Found | ImageFault]:
        """Return the keys of each row's values, or a fault where an image is not what it was when it was encoded."""
        own = [row.prompt_image_file for row, _, _ in asked]
        records = self._records([row.image_file for row, _, _ in asked] + [name for name in own if name is not None])
        others, text_keys = iter(records[len(asked) :]), self.spec.text.keys if self.spec.text else ()
        found: list[_Found | ImageFault] = []
        for (_, side, text), target, name in zip(asked, records, own, strict=False):
            prompt, prompt_side = (target, side) if name is None else (next(others), False)
            if isinstance(target, ImageFault) or isinstance(prompt, ImageFault):
                found.append(target if isinstance(target, ImageFault) else prompt)  # type: ignore[arg-type]
                continue
            moments = self.spec.targets[target_px, side].keys(target.content)
            features = [self.spec.prompts[need, prompt_side].keys(prompt.content) for need in self.spec.features]
            captions = [keys(text.encode()) for keys in text_keys]
            found.append(_Found((moments, *features, *captions), crop.plan(target.size_px, target_px)[1]))
        return found

    def _fill(
        self, table: Table, column: int, found: list[_Found | ImageFault], stack: Tensor, slots: Sequence[int]
    ) -> None:
        """Copies one value of each row into its slot; what is not there or damaged makes the row a fault."""
        asked = [(number, one.keys[column]) for number, one in enumerate(found) if not isinstance(one, ImageFault)]
        places = table.find([key for _, key in asked]).tolist()
        there = [(slots[number], place) for (number, _), place in zip(asked, places, strict=True) if place >= 0]
        damaged = table.fill(stack, [slot for slot, _ in there], [place for _, place in there])
        for (number, _), place in zip(asked, places, strict=True):
            if place < 0:
                what = f"its {table.kind.name} are not in the prepared set"
                found[number] = ImageFault("not_prepared", what, _AGAIN)
            elif place in damaged:
                what = f"its {table.kind.name} in the prepared set are not what was written"
                found[number] = ImageFault("damaged_values", what, f"remove {table.file_of(place)} and {_AGAIN}")

    def _records(self, names: Sequence[str]) -> list[Record | ImageFault]:
        """Return the record of each image whose file, if there still is one, holds what was encoded; else a fault."""
        records: list[Record | ImageFault] = []
        for name, record in zip(names, self.index.find(names), strict=True):
            try:
                records.append(self._trusted(name, record))
            except ImageFault as fault:
                records.append(fault)
        return records

    def _trusted(self, name: str, record: Record | None) -> Record:
        if record is None:
            raise ImageFault("not_prepared", "the picture is not in the prepared set", _AGAIN)
        if not record.is_sound:
            self._images.read(name)  # tells what is wrong with it
            raise ImageFault("changed", "the picture could not be read when the set was prepared", _AGAIN)
        status = self._images.stat(name)  # a file that is gone takes nothing with it: sets travel alone
        if status is not None and not record.fits(status):
            content, _ = self._images.read_file(name)
            if digest(content) != record.content:
                raise ImageFault("changed", "the picture changed since it was prepared", _AGAIN)
        self._demand_limits(record)
        return record

    def _demand_limits(self, record: Record) -> None:
        """The limits of this run, which may be narrower than those that the set was made with."""
        limits = self._images.limits
        check_size(record.size_px[::-1], limits)
        check_bytes(record.file_bytes, limits)
        check_density(record.size_px, record.file_bytes, limits)

    def _admits(self, record: Record) -> bool:
        with suppress(ImageFault):
            self._demand_limits(record)
            return True
        return False
