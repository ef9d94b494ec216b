"""Files and folders that exist whole or not at all: written beside their place, made durable, then renamed.

A stage has a hidden name, so a reader never meets it; a process that dies leaves one behind, which `sweep` removes.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from ip_adapter_trainer.core.errors import Problem

_LOCK = ".lock"
_LOCK_PATIENCE_S = 0.1  # longer than a start that only looks holds the lock
LOOK_PATIENCE_S = 0.02  # of such a start for another
_STAGED = ".staged"
_REPLACED = ".replaced"  # an older folder, out of the way while the newer one takes its name


def _stage_of(final: Path) -> Path:
    """Hidden, of this process, and with the same suffix: writers and loaders go by the suffix."""
    return final.with_name(f".{final.name}.{os.getpid()}{_STAGED}{final.suffix}")


def _sync(path: Path) -> None:
    """Waits until a file's or folder's content is on the disk; Windows cannot open a folder, nor sync what it reads."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _settle(path: Path) -> None:
    """A file of the usual permissions, on the disk: safetensors writes files that only their owner may read."""
    if path.is_file():
        umask = os.umask(0)
        os.umask(umask)
        path.chmod(0o666 & ~umask)
    _sync(path)


@contextmanager
def staged_file(final: Path) -> Iterator[Path]:
    """Give a path to write; rename it to `final` when the block ends well, remove it when it does not."""
    stage = _stage_of(final)
    try:
        yield stage
        _settle(stage)
        stage.replace(final)
        _sync(final.parent)
    finally:
        stage.unlink(missing_ok=True)


@contextmanager
def staged_folder(final: Path) -> Iterator[Path]:
    """Give an empty folder to fill; rename it to `final`, in place of an older one, when the block ends well."""
    stage, replaced = _stage_of(final), final.with_name(f".{final.name}{_REPLACED}")
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir()
    try:
        yield stage
        for path in [*stage.rglob("*"), stage]:
            _settle(path)
        if final.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            final.rename(replaced)
        stage.rename(final)
        _sync(final.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def sweep(parent: Path) -> None:
    """Remove from a folder what was left half written or half removed; call it while no one else writes there.

    A folder that was being replaced when the process died gets its name back if no newer one has taken it.
    """
    for path in parent.glob(f".*{_REPLACED}"):
        final = path.with_name(path.name.removeprefix(".").removesuffix(_REPLACED))
        if not final.exists():
            path.rename(final)
    for pattern in (f".*{_STAGED}*", f".*{_REPLACED}", ".*.removing"):
        for path in parent.glob(pattern):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def sweep_stages(final: Path) -> None:
    """Remove what writers of one file left beside it when they died; call it while no one else writes that file."""
    stage = re.compile(rf"\.{re.escape(final.name)}\.\d+{re.escape(_STAGED + final.suffix)}")
    for path in final.parent.iterdir():
        if stage.fullmatch(path.name):
            path.unlink(missing_ok=True)


def was_claimed(folder: Path) -> bool:
    """Return whether some run has ever claimed a folder; that run may have ended long ago."""
    return (folder / _LOCK).exists()


def lock(folder: Path, flag: str = "--output_dir", patience_s: float = _LOCK_PATIENCE_S) -> FileLock:
    """Claim a folder that is there for this run.

    Another that holds it is waited for a little: a start that only looks holds it for an instant.

    Raises:
        Problem: another run holds it.
    """
    claimed = FileLock(folder / _LOCK)
    try:
        claimed.acquire(timeout=patience_s, poll_interval=patience_s / 5)
    except Timeout as error:
        remedy = f"wait for it, stop it, or give another {flag}"
        raise Problem("another run is writing this folder", where=str(folder), remedy=remedy) from error
    return claimed
