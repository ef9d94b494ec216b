"""The images that rows name: found under the root, decoded, within the limits of the settings."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from ip_adapter_trainer.core.errors import Fault, Problem
from ip_adapter_trainer.core.values import Size
from ip_adapter_trainer.images.background import Colour, parse_colour
from ip_adapter_trainer.images.decode import DecodedImage, ImageFault, decode, read_file, read_size
from ip_adapter_trainer.images.limits import Limits
from ip_adapter_trainer.manifest.config import ReadConfig
from ip_adapter_trainer.manifest.hashes import Hashes
from ip_adapter_trainer.manifest.manifest import Manifest
from ip_adapter_trainer.runtime.workers import Pool
from ip_adapter_trainer.storage.files import safe_join, stat_plain

V = TypeVar("V")


@dataclass(frozen=True)
class ImageFiles:
    """Opens images by the names that rows give them."""

    root: Path  # resolved
    limits: Limits
    background: Colour
    allow_outside: bool
    hashes: Hashes | None = None  # recorded ones, which files must have

    @classmethod
    def of(cls, root: Path, config: ReadConfig) -> ImageFiles:
        """Return what opens the images under `root` as the settings want them read."""
        limits = Limits(
            max_pixels=int(config.max_image_megapixels * 1e6),
            max_file_bytes=int(config.max_image_mb * 2**20),
            min_side_px=config.min_side_px,
            max_aspect=config.max_aspect,
            max_pixels_per_byte=config.max_pixels_per_byte,
        )
        hashes = Hashes.of(config.image_hashes_file) if config.image_hashes_file else None
        return cls(root, limits, parse_colour(config.alpha_background), config.allow_outside_root, hashes)

    def read(self, name: str) -> DecodedImage:
        """Read and decode an image.

        Raises:
            ImageFault: there is none to be had.
        """
        source = self._path(name) if self.hashes is None else self.read_file(name)[0]
        return decode(source, self.limits, self.background)

    def read_file(self, name: str) -> tuple[bytes, os.stat_result]:
        """Return the content of an image's file, undecoded, and the file's status.

        Raises:
            ImageFault: there is none to be had.
        """
        content, status = read_file(self._path(name), self.limits)
        if self.hashes is not None:
            self.hashes.demand(name, content)
        return content, status

    def decode(self, content: bytes) -> DecodedImage:
        """Decode the content of a file; raises as `read` does."""
        return decode(content, self.limits, self.background)

    def stat(self, name: str) -> os.stat_result | None:
        """Return the status of an image's file; None if there is no such file.

        Raises:
            ImageFault: the name is refused.
        """
        status = stat_plain(self.root, name)
        try:
            return status or self._path(name).stat()
        except OSError:
            return None

    def size_px(self, name: str) -> Size:
        """Return height and width of the upright image, from its header.

        Raises:
            ImageFault: as far as the header tells.
        """
        return read_size(self._path(name), self.limits)

    def _path(self, name: str) -> Path:
        try:
            return safe_join(self.root, name, allow_outside=self.allow_outside)
        except Problem as problem:
            raise ImageFault("unsafe_path", problem.fault.what, problem.fault.remedy) from problem


def fault_of(error: ImageFault, where: str) -> Fault:
    """Return the fault of the row that stands at `where`."""
    return replace(error.fault, where=where)


def map_rows(
    function: Callable[[int], V], numbers: Iterable[int], manifest: Manifest, config: ReadConfig
) -> Iterator[V]:
    """Yield what a function returns for each row of a manifest, given its number; data workers call it.

    Raises:
        DataProblem: workers are lost over one row again and again.
    """
    workers, timeout_s = config.dataloader_num_workers or 0, config.data_timeout_s
    return Pool(function, where=manifest.where, workers=workers, timeout_s=timeout_s, chunk=64).values(numbers)
