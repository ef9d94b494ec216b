"""A prepared set: what the frozen encoders said of each picture, looked up by what was encoded and how.

Nothing here is found by a row's number. The address of a row of latents is a hash of the picture's content, the cut,
the autoencoder and the dtype, so another crop, another encoder or a changed picture is another address: what is served
is right or is not there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ip_adapter_trainer.core.types import Encoded, Geometry, Row
from ip_adapter_trainer.data.config import CutConfig
from ip_adapter_trainer.data.index import PictureIndex, Record
from ip_adapter_trainer.data.pictures import Pictures
from ip_adapter_trainer.data.shards import Table, TableKind, address
from ip_adapter_trainer.images import crop
from ip_adapter_trainer.images.buckets import Buckets
from ip_adapter_trainer.images.decode import PictureFault, check_bytes, check_size
from ip_adapter_trainer.images.ground import Colour

Size = tuple[int, int]

FORMAT = 1  # part of every address; raise it when the same settings cut or preprocess to other pixels than before
TARGET, PROMPT, MIRRORED_PROMPT = 1, 2, 4  # what a picture is used as; added up
_AGAIN = "run `ip-adapter prepare` again"
_CHUNK_ROWS = 8192
_MAX_MAPS = 512  # shards mapped at a time over all tables, half the usual limit of open files


@dataclass(frozen=True)
class View:
    """One encoding of one picture, and where it is kept."""

    kind: TableKind
    key: bytes
    target_px: Size | None  # cut to this size for the autoencoder; None: preprocessed for the image encoder
    mirrored: bool


@dataclass(frozen=True)
class Recipe:
    """All that decides what a picture is encoded to, but for the picture.

    Attributes:
        buckets: sizes of the targets.
        ground: colour under transparent pictures.
        pad_square: whether prompts are padded to a square.
        mirrors: whether mirrored pictures are wanted too.
        autoencoder: identity of the latents' encoder, config and weights.
        encoder: identity of the image encoder.
        moments: the table of each size.
        features: the tables of the kinds of feature wanted.
    """

    buckets: Buckets
    ground: Colour
    pad_square: bool
    mirrors: bool
    autoencoder: str
    encoder: str
    moments: dict[Size, TableKind]
    features: tuple[TableKind, ...]

    @property
    def tables(self) -> list[TableKind]:
        """All tables, each once; sizes whose latents have one shape share theirs."""
        return list(dict.fromkeys([*self.moments.values(), *self.features]))

    def target(self, content: bytes, target_px: Size, mirrored: bool) -> View:
        """The moments of a picture of this content, cut to a size."""
        kind = self.moments[target_px]
        cut = (FORMAT, *self.ground, *target_px, int(mirrored))
        return View(kind, address(kind.name, content, *cut, self.autoencoder, str(kind.dtype)), target_px, mirrored)

    def prompt(self, content: bytes, kind: TableKind, mirrored: bool) -> View:
        """The features of a picture of this content."""
        how = (FORMAT, *self.ground, int(self.pad_square), int(mirrored))
        return View(kind, address(kind.name, content, *how, self.encoder, str(kind.dtype)), None, mirrored)

    def views(self, content: bytes, size_px: Size, use: int) -> list[View]:
        """All that is wanted of a picture of this content and size, used so."""
        found: list[View] = []
        if use & TARGET:
            target_px = self.buckets.sizes_px[self.buckets.nearest(size_px)]
            found += [self.target(content, target_px, mirrored) for mirrored in self._sides(self.mirrors)]
        if use & PROMPT:
            sides = self._sides(bool(use & MIRRORED_PROMPT))
            found += [self.prompt(content, kind, mirrored) for kind in self.features for mirrored in sides]
        return found

    def _sides(self, both: bool) -> tuple[bool, ...]:
        return (False, True) if both else (False,)

    def uses(self, row: Row) -> list[tuple[str, int]]:
        """The pictures that a row names and what it uses each as; its own prompt image is never mirrored."""
        own = row.prompt_image_file
        if own is None:
            return [(row.image_file, TARGET | PROMPT | (MIRRORED_PROMPT if self.mirrors else 0))]
        return [(row.image_file, TARGET), (own, PROMPT)]


def drawn_anew(config: CutConfig) -> list[str]:
    """The flags by which each image is drawn otherwise every time, so that nothing could be encoded beforehand."""
    anew = {
        "--no_center_crop": not config.center_crop,
        "--prompt_crop_min_share": config.prompt_crop_min_share < 1,
        "--prompt_flip": config.prompt_flip,
    }
    return [flag for flag, on in anew.items() if on]


class PreparedSet:
    """A set's tables as they were when it was opened; read by many processes, each with maps of its own.

    Usage::

        prepared = PreparedSet(folder, recipe, Pictures.of(manifest.root, config))
        encoded, geometry = prepared.sample(row, layout.size_px(number), mirrored=False)

    Raises:
        Problem: a damaged shard.
    """

    def __init__(self, root: Path, recipe: Recipe, pictures: Pictures) -> None:
        self.root, self.recipe, self._pictures = root, recipe, pictures
        self.index = PictureIndex(root)
        kinds = recipe.tables
        self.tables = {kind: Table(root, kind, max(1, _MAX_MAPS // len(kinds))) for kind in kinds}

    def sizes_px(self, rows: Sequence[Row]) -> list[Size | None]:
        """Height and width of each row's target, None where its file must be asked."""
        found: list[Size | None] = []
        for start in range(0, len(rows), _CHUNK_ROWS):
            chunk = rows[start : start + _CHUNK_ROWS]
            records = self.index.find([row.image_file for row in chunk])
            found += [r.size_px if r is not None and r.is_sound and self._admits(r) else None for r in records]
        return found

    def lacking(self, rows: Sequence[Row]) -> Iterator[int]:
        """Numbers of the rows that cannot be served: not all there, and neither known to be faulty nor gone since."""
        for first in range(0, len(rows), _CHUNK_ROWS):
            chunk = rows[first : first + _CHUNK_ROWS]
            used = [(number, name, use) for number, row in enumerate(chunk) for name, use in self.recipe.uses(row)]
            records = self.index.find([name for _, name, _ in used])
            there = self.all_there([(record, use) for record, (_, _, use) in zip(records, used, strict=True)])
            missing = {
                number
                for (number, name, _), record, is_there in zip(used, records, there, strict=True)
                if not is_there and (record is None or self._pictures.stat(name) is not None)
            }
            yield from (first + number for number in sorted(missing))

    def all_there(self, pictures: Sequence[tuple[Record | None, int]]) -> list[bool]:
        """Whether everything wanted of each picture, used so, is in the set; a known fault wants nothing."""
        there = [record is not None for record, _ in pictures]
        wanted: dict[TableKind, list[tuple[int, bytes]]] = {}
        for number, (record, use) in enumerate(pictures):
            if record is not None and record.is_sound:
                for view in self.recipe.views(record.content, record.size_px, use):
                    wanted.setdefault(view.kind, []).append((number, view.key))
        for kind, views in wanted.items():
            places = self.tables[kind].find([key for _, key in views])
            for (number, _), place in zip(views, places.tolist(), strict=True):
                there[number] &= place >= 0
        return there

    def sample(self, row: Row, target_px: Size, mirrored: bool) -> tuple[Encoded, Geometry]:
        """What the encoders said of a row's pictures, and how its target was cut.

        Raises:
            PictureFault: a picture that could not be read, changed since, or is not in the set.
        """
        target = self._record(row.image_file)
        own = row.prompt_image_file
        prompt, prompt_mirrored = (target, mirrored) if own is None else (self._record(own), False)
        moments = self._value(self.recipe.target(target.content, target_px, mirrored))
        features = self._value(self.recipe.prompt(prompt.content, self.recipe.features[0], prompt_mirrored))
        return Encoded(moments, features), crop.plan(target.size_px, target_px)[1]

    def _value(self, view: View) -> Tensor:
        place = int(self.tables[view.kind].find([view.key])[0])
        if place < 0:
            raise PictureFault("not_prepared", f"its {view.kind.name} are not in the prepared set", _AGAIN)
        return self.tables[view.kind][place]

    def _record(self, name: str) -> Record:
        """The record of a picture whose file, if there still is one, holds what was encoded."""
        record = self.index.find([name])[0]
        if record is None:
            raise PictureFault("not_prepared", "the picture is not in the prepared set", _AGAIN)
        if not record.is_sound:
            self._pictures.read(name)  # tells what is wrong with it
            raise PictureFault("changed", "the picture could not be read when the set was prepared", _AGAIN)
        status = self._pictures.stat(name)  # a file that is gone takes nothing with it: sets travel alone
        if status is not None and not record.fits(status):
            content, _ = self._pictures.read_file(name)
            if address(content) != record.content:
                raise PictureFault("changed", "the picture changed since it was prepared", _AGAIN)
        self._demand_limits(record)
        return record

    def _demand_limits(self, record: Record) -> None:
        """The limits of this run, which may be narrower than those that the set was made with."""
        limits = self._pictures.limits
        check_size(record.size_px[::-1], limits)
        check_bytes(record.file_bytes, limits)

    def _admits(self, record: Record) -> bool:
        try:
            self._demand_limits(record)
        except PictureFault:
            return False
        return True
