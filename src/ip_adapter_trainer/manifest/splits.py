"""Folders as `datasets` lays them out: `train`, `validation` and other splits, and a list of the images in each."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path, PurePath

from ip_adapter_trainer.core.errors import Problem
from ip_adapter_trainer.images.decode import SUFFIXES as IMAGE_SUFFIXES
from ip_adapter_trainer.manifest.noticed import Noticed

METADATA = "metadata"  # name of the list in a folder of images
METADATA_IMAGE_KEY = "file_name"  # and its key of the image's path

_LISTS = (".jsonl", ".csv", ".tsv", ".json")
_TRAINED = ("train", "training")
_OTHERS = ("validation", "valid", "val", "dev", "test", "testing", "eval", "evaluation")


def metadata_in(folder: Path) -> Path | None:
    """Return the list that a folder keeps of its images; None if it keeps none.

    Raises:
        Problem: there are two.
    """
    found = [file for file in (folder / f"{METADATA}{suffix}" for suffix in _LISTS) if file.exists()]
    if len(found) > 1:
        what = f"there are both {found[0].name} and {found[1].name}"
        raise Problem(what, where=str(folder), remedy=f"name one of them: --data_json_file {found[0]}")
    return found[0] if found else None


def trained_part(folder: Path, noticed: Noticed, *, follows: bool) -> Path:
    """Return what is trained on of a folder: its `train` folder if it has splits, else all of it.

    `noticed` takes what lies beside the `train` folder; with `follows`, linked folders are taken too.

    Raises:
        Problem: the folder cannot be read.
    """
    if metadata_in(folder):
        return folder
    splits = _names(folder, lambda name: name.lower() in (*_TRAINED, *_OTHERS) and _is_folder(folder / name, follows))
    trained = [name for name in splits if name.lower() in _TRAINED]
    others = [name for name in splits if name not in trained]
    if len(trained) != 1 or not (others or metadata_in(folder / trained[0])):
        return folder
    for name in others:
        way = f"validate on one by train --validation_data {folder / others[0]}"
        noticed.add(f"splits beside {trained[0]}, not trained on ({way})", name)
    for name in _names(folder, lambda name: name not in splits):
        if PurePath(name).suffix.lower() in IMAGE_SUFFIXES or (folder / name).is_dir():
            noticed.add(f"folders and pictures beside {trained[0]}, not read", name)
    return folder / trained[0]


def _is_folder(path: Path, follows: bool) -> bool:
    return path.is_dir() and (follows or not path.is_symlink())


def _names(folder: Path, wanted: Callable[[str], bool]) -> list[str]:
    try:
        with os.scandir(folder) as found:
            return sorted(entry.name for entry in found if not entry.name.startswith(".") and wanted(entry.name))
    except OSError as error:
        what = f"the folder cannot be read: {error.strerror}"
        raise Problem(what, where=str(folder), remedy="check its permissions") from error
