"""Choice of the rows that are kept out of training, for validation on images that nothing was trained on."""

from __future__ import annotations

import hashlib
import posixpath
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ip_adapter_trainer.core.values import Row

LEAST_IMAGES = 8  # are held out where there are enough; validation gives no verdict by fewer
_ONE_IN = 3  # images at most, where they are few


def hold_out(rows: Sequence[Row], share: float, root: Path) -> NDArray[np.bool_]:
    """Choose the rows that are not trained on.

    Rows that share an image, as target or as prompt, are all on one side. Groups of such rows are taken in the order of
    a hash of their images' names, so that the choice depends on nothing but the names, and a set that grows keeps most
    of it. At least `LEAST_IMAGES` are held out, but no more than a third unless the share is larger.

    Args:
        rows: of a manifest.
        share: of the target images, from 0 (none) to below 1.
        root: folder that image paths start from.

    Returns:
        Whether each row is held out, [rows].
    """
    if not share or not len(rows):
        return np.zeros(len(rows), np.bool_)
    targets, prompts = _keys(rows, root)
    keys, numbers = np.unique(np.concatenate([targets, prompts]), return_inverse=True)  # keys ascend: so do groups
    group_of_row = _groups(numbers[: len(rows)], numbers[len(rows) :], len(keys))
    images = np.bincount(group_of_row[np.unique(targets, return_index=True)[1]], minlength=len(keys))  # [groups]
    total = int(images.sum())
    most = max(total // _ONE_IN, round(share * total))
    wanted = min(max(LEAST_IMAGES, round(share * total)), most)
    chosen, held = np.zeros(len(keys), np.bool_), 0
    for group in np.flatnonzero(images).tolist():
        if held >= wanted:
            break
        if held + images[group] <= most:
            chosen[group] = True
            held += int(images[group])
    return chosen[group_of_row]


def seen_in(rows: Sequence[Row], root: Path, others: Sequence[Row], others_root: Path) -> NDArray[np.bool_]:
    """Return which rows show an image, as target or as prompt, that rows of another set show too, [rows]."""
    known = np.concatenate(_keys(others, others_root, whole=True))
    targets, prompts = _keys(rows, root, whole=True)
    return np.isin(targets, known) | np.isin(prompts, known)


def one_an_image(rows: Sequence[Row], numbers: Iterable[int], root: Path) -> Iterator[int]:
    """Give, of rows by their numbers, those that are prompted with an image that none before them was."""
    seen = set[str]()
    for number in numbers:
        row = rows[number]
        name = plain_name(row.prompt_image_file or row.image_file, root)
        if name not in seen:
            seen.add(name)
            yield number


def plain_name(image_file: str, root: Path) -> str:
    """Return one name for all ways of writing an image's path: under the root as it is there, without detours."""
    if not image_file.startswith("/") and "./" not in image_file and "//" not in image_file:
        return image_file
    return posixpath.normpath(posixpath.join(root, image_file)).removeprefix(f"{root}/")


def _keys(rows: Sequence[Row], root: Path, *, whole: bool = False) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """A hash of the names of each row's target and prompt, [rows] each; a prompt of its own or the target again.

    With `whole`, of whole paths, by which sets with other roots can be compared.
    """
    before = f"{root}/" if whole else ""

    def key(image_file: str) -> bytes:
        """Hash a name."""
        name = plain_name(image_file, root)
        name = name if name.startswith("/") else before + name
        return hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest()

    targets, prompts = bytearray(), bytearray()
    for row in rows:
        target = key(row.image_file)
        targets += target
        prompts += key(row.prompt_image_file) if row.prompt_image_file else target
    return np.frombuffer(bytes(targets), "<u8"), np.frombuffer(bytes(prompts), "<u8")


def _groups(targets: NDArray[np.int64], prompts: NDArray[np.int64], images: int) -> NDArray[np.int64]:
    """The group of each row, [rows]: the lowest of the images that rows link to its own (union-find)."""
    differ = targets != prompts
    if not differ.any():
        return targets
    lowest = list(range(images))

    def find(image: int) -> int:
        """Follow the links to the group's lowest image, halving the way."""
        while lowest[image] != image:
            lowest[image] = lowest[lowest[image]]
            image = lowest[image]
        return image

    for target, prompt in zip(targets[differ].tolist(), prompts[differ].tolist(), strict=True):
        one, other = sorted((find(target), find(prompt)))
        lowest[other] = one
    return np.array([find(target) for target in targets.tolist()], np.int64)
