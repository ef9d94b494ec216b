"""The size that each row is cut to, decided before training from the headers of the images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from ip_adapter_trainer.cache.config import BucketConfig
from ip_adapter_trainer.core.errors import Fault
from ip_adapter_trainer.core.values import Size
from ip_adapter_trainer.images.buckets import Buckets
from ip_adapter_trainer.images.decode import ImageFault
from ip_adapter_trainer.manifest.images import ImageFiles, fault_of, map_rows
from ip_adapter_trainer.manifest.manifest import Manifest

MAX_TRIES = 16  # rows tried for one image; so many broken neighbours are no accident


@dataclass(frozen=True)
class Bucketing:
    """The buckets and, for each row, the number of its bucket."""

    buckets: Buckets
    bucket_of_row: NDArray[np.int16]  # [rows]; -1: not trained on
    faults: tuple[Fault, ...] = ()  # rows whose header told no size: they are in the square's bucket

    def size_px(self, row: int) -> Size:
        """Return the height and width that a row is cut to."""
        return self.buckets.sizes_px[self.bucket_of_row[row]]

    def only(self, wanted: NDArray[np.bool_]) -> Bucketing:
        """Return the bucketing of the rows that `wanted` [rows] marks, all keeping their numbers."""
        return replace(self, bucket_of_row=np.where(wanted, self.bucket_of_row, np.int16(-1)))


def first_without_stand_in(bucket_of_row: NDArray[np.int16], faulty: Sequence[int]) -> int | None:
    """Return the first row of the first bucket at which training stops, as no row after it stands in for it.

    Args:
        bucket_of_row: [rows]; -1: not trained on.
        faulty: numbers of the rows that cannot be read.
    """
    is_faulty = np.zeros(len(bucket_of_row), bool)
    is_faulty[list(faulty)] = True
    for bucket in np.unique(bucket_of_row[is_faulty & (bucket_of_row >= 0)]):
        rows = np.flatnonzero(bucket_of_row == bucket)
        tries = min(MAX_TRIES, len(rows))
        faulty_before = np.cumsum(np.concatenate(([0], is_faulty[rows], is_faulty[rows[: tries - 1]])))  # once around
        stuck = np.flatnonzero(faulty_before[tries:] - faulty_before[:-tries] == tries)
        if len(stuck):
            return int(rows[stuck[0]])
    return None


def assign_buckets(manifest: Manifest, config: BucketConfig, known: Sequence[Size | None] | None = None) -> Bucketing:
    """Assign every row to a bucket: the one square, or with `aspect_ratio_buckets` the nearest by its image's header.

    Args:
        manifest: the rows.
        config: the buckets.
        known: of each row the size of its upright image, or None: then its header is read.
    """
    buckets = config.buckets()
    if not config.aspect_ratio_buckets:
        return Bucketing(buckets, np.zeros(len(manifest.rows), np.int16))
    sizes = scan_sizes(manifest, config, known)
    square = buckets.nearest((1, 1))
    numbers = [square if isinstance(size, Fault) else buckets.nearest(size) for size in sizes]
    faults = tuple(size for size in sizes if isinstance(size, Fault))
    return Bucketing(buckets, np.array(numbers, np.int16), faults)


def scan_sizes(
    manifest: Manifest, config: BucketConfig, known: Sequence[Size | None] | None = None
) -> Sequence[Size | Fault]:
    """Return height and width of each row's upright image in pixels, or a fault where its header gives none.

    See `assign_buckets`.
    """
    size_of = partial(_size_of, manifest, ImageFiles.of(manifest.root, config))
    sizes: Sequence[Size | None] = known or [None] * len(manifest.rows)
    unknown = (number for number, size in enumerate(sizes) if size is None)
    read = map_rows(size_of, unknown, manifest, config)
    return [next(read) if size is None else size for size in sizes]


def _size_of(manifest: Manifest, images: ImageFiles, number: int) -> Size | Fault:
    try:
        return images.size_px(manifest.rows[number].image_file)
    except ImageFault as error:
        return fault_of(error, manifest.where(number))
