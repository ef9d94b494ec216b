"""The checkpoints of a run's folder, and a look at whether their files are still what was written."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from ip_adapter_trainer.core.log import say
from ip_adapter_trainer.storage.documents import read_json
from ip_adapter_trainer.storage.files import open_regular

MANIFEST = "manifest.json"  # {file name: {"sha256": hexadecimal, "bytes": size}}, written last
_NAME = re.compile(r"checkpoint-(\d+)")


def step_of(folder: Path) -> int | None:
    """Return the N of a folder named `checkpoint-N`, or None for another name.

    >>> step_of(Path("run/checkpoint-500")), step_of(Path("run"))
    (500, None)
    """
    match = _NAME.fullmatch(folder.name)
    return int(match.group(1)) if match else None


def numbered_checkpoints(output: Path) -> list[tuple[int, Path]]:
    """Return the `checkpoint-N` folders in a run's folder with their steps, oldest first."""
    found = [(step, p) for p in output.glob("checkpoint-*") if (step := step_of(p)) is not None and p.is_dir()]
    return sorted(found)


def all_checkpoints(output: Path) -> list[Path]:
    """Return the `checkpoint-N` folders in a run's folder, oldest first."""
    return [folder for _, folder in numbered_checkpoints(output)]


def newest(output: Path, is_whole: Callable[[Path], bool]) -> Path | None:
    """Return the newest checkpoint that is whole, and print a line for each newer one that is not."""
    for folder in reversed(all_checkpoints(output)):
        if is_whole(folder):
            return folder
        say(f"{folder.name} is incomplete or damaged and is passed over")
    return None


def sha256_of(file: Path) -> str:
    """Return the SHA-256 of a file's bytes in hexadecimal."""
    with open_regular(file) as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()  # type: ignore[arg-type]


def verified(folder: Path, names: Iterable[str] | None = None, *, required: Iterable[str] = ()) -> bool:
    """Return whether a checkpoint's files have the sizes and hashes that its manifest lists.

    All of them are looked at, or those of some `names`; the manifest must name the required ones. Files outside the
    folder are never looked at.
    """
    return _as_listed(folder, names, required, hashed=True)


def complete(folder: Path, required: Iterable[str] = ()) -> bool:
    """Return whether a checkpoint's files have the sizes that its manifest says: a quick look that reads none."""
    return _as_listed(folder, None, required, hashed=False)


def _as_listed(folder: Path, names: Iterable[str] | None, required: Iterable[str], *, hashed: bool) -> bool:
    try:
        entries = read_json(folder / MANIFEST)
        if not isinstance(entries, dict) or not set(required) <= entries.keys():
            return False
        chosen = {name: entries[name] for name in (entries if names is None else names)}
        if any(Path(name).name != name for name in chosen):
            return False
        return all(
            (folder / name).stat().st_size == entry["bytes"]
            and (not hashed or sha256_of(folder / name) == entry["sha256"])
            for name, entry in chosen.items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
