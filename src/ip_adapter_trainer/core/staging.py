"""Files and folders that exist whole or not at all: written beside their place, made durable, then renamed.

A stage has a hidden name, so a reader never meets it; a process that dies leaves one behind, which `sweep` removes.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_SUFFIX = ".staged"


def _stage_of(final: Path) -> Path:
    return final.with_name(f".{final.name}.{os.getpid()}{_SUFFIX}")


def _sync(path: Path) -> None:
    """Waits until a file's or folder's content is on the disk; not every system can open a folder for that."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def staged_file(final: Path) -> Iterator[Path]:
    """Gives a path to write; renames it to `final` when the block ends well, removes it when it does not.

    Usage::

        with staged_file(Path("adapter.safetensors")) as stage:
            save_file(tensors, stage)
            check(stage)
    """
    stage = _stage_of(final).with_suffix(_SUFFIX + final.suffix)  # writers look at the suffix
    try:
        yield stage
        _sync(stage)
        stage.replace(final)
        _sync(final.parent)
    finally:
        stage.unlink(missing_ok=True)


@contextmanager
def staged_folder(final: Path) -> Iterator[Path]:
    """Gives an empty folder to fill; renames it to `final`, replacing an older one, when the block ends well."""
    stage = _stage_of(final)
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir()
    try:
        yield stage
        for path in [*stage.rglob("*"), stage]:
            _sync(path)
        if final.exists():
            final.rename(doomed := final.with_name(f".{final.name}.old{_SUFFIX}"))
            stage.rename(final)
            shutil.rmtree(doomed, ignore_errors=True)
        else:
            stage.rename(final)
        _sync(final.parent)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def sweep(parent: Path) -> None:
    """Removes what died half written in a folder; call it while no one else writes there."""
    for path in parent.glob(f".*{_SUFFIX}*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    for path in parent.glob(".*.removing"):
        shutil.rmtree(path, ignore_errors=True)
