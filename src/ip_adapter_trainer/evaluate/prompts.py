"""The rows that an evaluation draws: chosen at random, their pictures tried first, read again when they are needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from PIL.Image import Image

from ip_adapter_trainer.core.rng import stream
from ip_adapter_trainer.core.values import Fault, Row
from ip_adapter_trainer.evaluate.config import EvaluateConfig
from ip_adapter_trainer.images.decode import ImageFault
from ip_adapter_trainer.manifest.faults import demand_usable
from ip_adapter_trainer.manifest.hold_out import plain_name
from ip_adapter_trainer.manifest.images import ImageFiles, fault_of, map_rows
from ip_adapter_trainer.manifest.manifest import usable_manifest


@dataclass(frozen=True)
class Prompt:
    """One row: a picture and the caption that belongs to it."""

    read: Callable[[], Image]
    caption: str
    image: str  # name of the picture; rows may share it
    number: int  # of the row in its manifest, by which its seeds are drawn


def read_prompts(config: EvaluateConfig) -> tuple[list[Prompt], tuple[Fault, ...]]:
    """Return rows chosen by the seed whose images can be read, and the faults of the manifest and of the other rows.

    Raises:
        Problem: the manifest cannot be read at all.
        DataProblem: more rows are faulty than the settings allow, or none is left.
    """
    manifest = usable_manifest(config)
    pictures = ImageFiles.of(manifest.root, config)
    chosen = sorted(stream(config.seed, "evaluate-rows").permutation(len(manifest.rows))[: config.num_rows].tolist())
    prompts = [_prompt(pictures, manifest.rows[number], number, config.seed) for number in chosen]
    errors = list(map_rows(_error, prompts, config.dataloader_num_workers))
    unread = tuple(fault_of(e, manifest.where(p.number)) for p, e in zip(prompts, errors, strict=True) if e is not None)
    demand_usable(unread, len(chosen), config.max_fault_rate)
    sound = [prompt for prompt, error in zip(prompts, errors, strict=True) if error is None]
    return sound, (*manifest.faults, *unread)


def _prompt(pictures: ImageFiles, row: Row, number: int, seed: int) -> Prompt:
    name = row.prompt_image_file or row.image_file
    return Prompt(partial(_read, pictures, name), row.caption(seed, number), plain_name(name, pictures.root), number)


def _read(pictures: ImageFiles, name: str) -> Image:
    return pictures.read(name).image


def _error(prompt: Prompt) -> ImageFault | None:
    """Return the fault for which a row's image cannot be read, or None."""
    try:
        prompt.read()
    except ImageFault as error:
        return error
    return None
