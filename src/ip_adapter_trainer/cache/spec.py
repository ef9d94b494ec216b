"""Contents of prepared sets: the encodings of each image, and the key of each.

Nothing here is found by a row's number. The key of a row of latents is a hash of the image's content, the cut, the
autoencoder and the dtype, so another crop, another encoder or a changed image has another key: what is served is right
or is not there.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from ip_adapter_trainer.cache.config import CutConfig
from ip_adapter_trainer.cache.shards import TableKind
from ip_adapter_trainer.core.values import Need, Row, Size
from ip_adapter_trainer.images.background import Colour
from ip_adapter_trainer.images.buckets import Buckets
from ip_adapter_trainer.storage.digests import Digests, framed

FORMAT = 3  # part of every key; raise it when the same settings give other pixels or other encodings than before
TEXT_FORMAT = 1  # the same for captions
TARGET, PROMPT, MIRRORED_PROMPT, ALL_USES = 1, 2, 4, 8  # what an image is used as; added up, less than the last


@dataclass(frozen=True)
class View:
    """One encoding of one image, and where it is kept."""

    kind: TableKind
    key: bytes
    target_px: Size | None  # cut to this size for the autoencoder; None: preprocessed for an image encoder
    mirrored: bool
    role: str = ""  # of the image encoder; empty: it is for the autoencoder


@dataclass(frozen=True)
class TextSpec:
    """All that decides what a caption is encoded to, but for the caption."""

    encoders: str  # identity of the text encoders and of the rules by which they are asked
    tables: tuple[TableKind, ...]  # one for each tensor that the family makes of a caption

    @cached_property
    def keys(self) -> tuple[Digests, ...]:
        """By the caption in UTF-8, for each table."""
        after = {kind: framed(TEXT_FORMAT, self.encoders, str(kind.dtype)) for kind in self.tables}
        return tuple(Digests(framed(kind.name), after[kind]) for kind in self.tables)


Views = tuple[View, ...]  # of one image, by the same pixels


@dataclass(frozen=True)
class Way:
    """One way of encoding images: all that decides a `View` but for the image."""

    kind: TableKind
    keys: Digests  # by the hash of the image's file
    target_px: Size | None
    mirrored: bool
    role: str = ""

    def view(self, content: bytes) -> View:
        """Return the view of an image of this content."""
        return View(self.kind, self.keys(content), self.target_px, self.mirrored, self.role)


@dataclass(frozen=True)
class CacheSpec:
    """All that decides what an image is encoded to, but for the image."""

    buckets: Buckets  # sizes of the targets
    background: Colour  # colour under transparent images
    pad_square: bool  # whether prompts are padded to a square
    mirrors: bool  # whether mirrored images are wanted too
    autoencoder: str  # identity of the latents' encoder, config and weights
    encoders: dict[str, str]  # digests of the image encoders, by role
    moments: dict[Size, TableKind]  # the table of each size
    features: dict[Need, TableKind]  # the tables of the features wanted
    text: TextSpec | None = None  # how captions are encoded, if they are

    @property
    def tables(self) -> list[TableKind]:
        """All tables, each once; sizes whose latents have one shape share theirs."""
        text = self.text.tables if self.text else ()
        return list(dict.fromkeys([*self.moments.values(), *self.features.values(), *text]))

    @cached_property
    def targets(self) -> dict[tuple[Size, bool], Way]:
        """The ways of making moments, by the size cut to and whether mirrored."""
        return {(size, side): self._target(size, side) for size in self.moments for side in (False, True)}

    @cached_property
    def prompts(self) -> dict[tuple[Need, bool], Way]:
        """The ways of making features, by their table and whether mirrored."""
        return {(need, side): self._prompt(need, side) for need in self.features for side in (False, True)}

    def _target(self, target_px: Size, mirrored: bool) -> Way:
        kind = self.moments[target_px]
        after = framed(FORMAT, *self.background, *target_px, int(mirrored), self.autoencoder, str(kind.dtype))
        return Way(kind, Digests(framed(kind.name), after), target_px, mirrored)

    def _prompt(self, need: Need, mirrored: bool) -> Way:
        kind, encoder = self.features[need], self.encoders[need.role]
        after = framed(FORMAT, *self.background, int(self.pad_square), int(mirrored), encoder, str(kind.dtype))
        return Way(kind, Digests(framed(kind.name), after), None, mirrored, need.role)

    def ways(self, target_px: Size, use: int) -> list[Way]:
        """Return all the ways in which an image of this bucket is encoded for this use."""
        sides = (False, True) if self.mirrors else (False,)
        prompt_sides = (False, True) if use & MIRRORED_PROMPT else (False,)
        targets = [self.targets[target_px, mirrored] for mirrored in sides if use & TARGET]
        return targets + [self.prompts[n, side] for n in self.features for side in prompt_sides if use & PROMPT]

    def views(self, content: bytes, size_px: Size, use: int) -> list[View]:
        """Return all the views of an image of this content and size that this use needs."""
        return [way.view(content) for way in self.ways(self.buckets.sizes_px[self.buckets.nearest(size_px)], use)]

    def uses(self, row: Row) -> list[tuple[str, int]]:
        """Return the images that a row names and what it uses each as; its own prompt image is never mirrored."""
        own = row.prompt_image_file
        if own is None:
            return [(row.image_file, TARGET | PROMPT | (MIRRORED_PROMPT if self.mirrors else 0))]
        return [(row.image_file, TARGET), (own, PROMPT)]


def random_cuts(config: CutConfig) -> list[str]:
    """Return the flags by which each image is cut at random every time, so that nothing can be encoded beforehand."""
    anew = {
        "--no_center_crop": not config.center_crop,
        "--prompt_crop_min_share": config.prompt_crop_min_share < 1,
        "--prompt_flip": config.prompt_flip,
    }
    return [flag for flag, on in anew.items() if on]
