"""The rows that an evaluation draws: chosen at random, their images tried first, read again when they are needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from PIL.Image import Image

from ip_adapter_trainer.core.errors import Fault
from ip_adapter_trainer.core.rng import stream
from ip_adapter_trainer.core.values import Row
from ip_adapter_trainer.evaluate.config import EvaluateConfig
from ip_adapter_trainer.images.decode import ImageFault
from ip_adapter_trainer.manifest.faults import demand_usable
from ip_adapter_trainer.manifest.hold_out import plain_name
from ip_adapter_trainer.manifest.images import ImageFiles, fault_of, map_rows
from ip_adapter_trainer.manifest.manifest import Manifest, usable_manifest


@dataclass(frozen=True)
class Prompt:
    """One row: an image and the caption that belongs to it."""

    read: Callable[[], Image]
    caption: str
    image: str  # its name; rows may share it
    number: int  # of the row in its manifest, by which its seeds are drawn


def read_prompts(config: EvaluateConfig) -> tuple[list[Prompt], tuple[Fault, ...]]:
    """Return rows chosen by the seed whose images can be read, and the faults of the manifest and of the other rows.

    Raises:
        Problem: the manifest cannot be read at all.
        DataProblem: more rows are faulty than the settings allow, or none is left.
    """
    manifest = usable_manifest(config)
    images = ImageFiles.of(manifest.root, config)
    chosen = sorted(stream(config.seed, "evaluate-rows").permutation(len(manifest.rows))[: config.num_rows].tolist())
    faults = list(map_rows(partial(_fault, manifest, images), chosen, manifest, config))
    unread = tuple(fault for fault in faults if fault is not None)
    demand_usable(unread, len(chosen), config.max_fault_rate)
    sound = [number for number, fault in zip(chosen, faults, strict=True) if fault is None]
    prompts = [_prompt(images, manifest.rows[number], number, config.seed) for number in sound]
    return prompts, (*manifest.faults, *unread)


def _prompt(images: ImageFiles, row: Row, number: int, seed: int) -> Prompt:
    name = row.prompt_image_file or row.image_file
    caption, image = row.caption(seed, number), plain_name(name, images.root)
    return Prompt(lambda: images.read(name).image, caption, image, number)


def _fault(manifest: Manifest, images: ImageFiles, number: int) -> Fault | None:
    """Return the fault for which a row's image prompt cannot be read, or None."""
    row = manifest.rows[number]
    try:
        images.read(row.prompt_image_file or row.image_file)
    except ImageFault as error:
        return fault_of(error, manifest.where(number))
    return None
