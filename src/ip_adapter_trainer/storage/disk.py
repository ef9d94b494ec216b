"""Errors of a disk or a path that refuses, which writers raise each in its own way, told in one."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ip_adapter_trainer.core.errors import Problem, StorageProblem, first_line

_OF_THE_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG}

_OF_THE_PATH = {  # and what it means, where the system's words do not say it
    errno.EEXIST: "a file has the name of a folder that is needed",
    errno.ENOTDIR: "a file is where a folder is needed",
    errno.EISDIR: "a folder is where a file is needed",
    errno.ENAMETOOLONG: "",
    errno.ELOOP: "",
    errno.EACCES: "",
    errno.EPERM: "",
}


def refusals() -> tuple[type[Exception], ...]:
    """Return the classes of error that writing files or tensors may raise.

    RuntimeError is among them: on a full disk `torch.save` raises one that says only that its archive has a wrong
    length.
    """
    from safetensors import SafetensorError

    return OSError, SafetensorError, RuntimeError


def reason_of(error: Exception) -> str:
    """Return the reason why a file was not written, in a line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return first_line(error)


@contextmanager
def as_storage_problem() -> Iterator[None]:
    """Turn the system's errors about the disk or a path in this block into Problems, whoever was writing.

    Raises:
        StorageProblem: the disk is full, read-only or broken.
        Problem: there can be no file or folder of this path, or this user may not write there.
    """
    try:
        yield
    except OSError as error:
        where = str(error.filename or "")
        if error.errno in _OF_THE_DISK:
            remedy = "make room, or choose another folder"
            raise StorageProblem(reason_of(error), where=where, remedy=remedy) from error
        if error.errno in _OF_THE_PATH and where:
            what = _OF_THE_PATH[error.errno] or reason_of(error)
            raise Problem(what, where=where, remedy="give another path, or change what is there") from error
        raise


def demand_folder(folder: Path) -> None:
    """Demand that a folder can be written into, or can be made at this path; make nothing.

    Raises:
        Problem: a file is there, or on the way to it, or this user may not write there.
        StorageProblem: the disk is read-only.
    """
    with as_storage_problem():
        there = _first_that_exists(folder.absolute())
        code = 0 if there.is_dir() else errno.ENOTDIR
        if not code and not os.access(there, os.W_OK | os.X_OK):
            code = errno.EROFS if os.statvfs(there).f_flag & os.ST_RDONLY else errno.EACCES
        if code:
            raise OSError(code, os.strerror(code), str(there))


def _first_that_exists(path: Path) -> Path:
    """The path itself or the closest above it; what the system says of one that cannot be is raised."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return path if path.is_symlink() else _first_that_exists(path.parent)
    return path
