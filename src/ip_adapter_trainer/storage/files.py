"""Files named by others: opened only when regular, found only under their root."""

from __future__ import annotations

import errno
import os
import re
import stat
from contextlib import suppress
from pathlib import Path, PureWindowsPath
from typing import BinaryIO

from ip_adapter_trainer.core.errors import Problem

_URL = re.compile(r"[a-z][a-z0-9+.-]*://|data:", re.IGNORECASE)
_SUSPECT = re.compile(r"\A(?:\Z|/)|[\0\\:]|\.\.")  # in every name that `refusal` refuses, and in some others
_IMAGE = "give the file of weights that this picture belongs to"
_MISTAKEN = (  # the first bytes of what people have in place of weights; what it is, what to do
    (rb"version https://git-lfs", "a pointer of Git LFS in place of the weights", "git lfs pull, or download the file"),
    (rb"\s*<(!doctype html|html)", "an HTML page, probably of a download", "download it by the file's raw link"),
    (rb"\x89PNG\r\n", "a PNG picture", _IMAGE),
    (rb"\xff\xd8\xff", "a JPEG picture", _IMAGE),
    (rb"RIFF....WEBP", "a WebP picture", _IMAGE),
)
_ALLOW = "give a path under the root, or pass --allow_outside_root if these files are trusted"


class NotRegularError(OSError):
    """The name is of a folder, pipe, socket or device."""


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading; never wait for a pipe's writer and never touch a device.

    Raises:
        NotRegularError: the path is something else than a file.
        OSError: missing or not readable.
    """
    _demand_regular(path, path.stat())  # before opening: opening some devices has effects
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    stream = os.fdopen(os.open(path, flags), "rb")
    try:
        _demand_regular(path, os.fstat(stream.fileno()))  # after opening: the name may have changed hands
    except OSError:
        stream.close()
        raise
    return stream


def _demand_regular(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise NotRegularError(errno.EINVAL, "not a regular file", str(path))


def mistaken(path: Path) -> tuple[str, str] | None:
    """Return what a file is that does not hold the weights its name promises, and what to do; None: not known."""
    with suppress(OSError), path.open("rb") as file:
        begin = file.read(256)
        if not begin:
            return "empty", "copy or download it again"
        for pattern, what, remedy in _MISTAKEN:
            if re.match(pattern, begin, re.IGNORECASE | re.DOTALL):
                return what, remedy
    return None


def refusal(name: str, *, allow_outside: bool = False) -> tuple[str, str] | None:
    """Return why the spelling of a name in a data file is refused, with a remedy; None where it is not.

    The disk is not asked, so links are not seen: `safe_join` sees them.
    """
    if not _SUSPECT.search(name):  # a quick proof for a million names: nothing below can speak against it
        return None
    if not name:
        return "the path is empty", "name a file"
    if "\0" in name:
        return "the path holds a NUL character", "remove it"
    if _URL.match(name):
        return "the path is a URL", "download the file; nothing is fetched while training"
    if os.name == "posix" and "\\" in name:
        return "the path holds a backslash", "write it with '/'"
    if allow_outside:
        return None
    spelled = PureWindowsPath(name)  # both slashes separate
    if spelled.root or (os.name == "nt" and ":" in name):
        return "the path is absolute", _ALLOW
    if ".." in spelled.parts:
        return "the path holds '..'", _ALLOW
    return None


def safe_join(root: Path, name: str, *, allow_outside: bool = False) -> Path:
    """Return the resolved path of a name in a data file under a resolved root.

    One that leaves the root by its spelling or by a link is refused, unless `allow_outside`.

    Raises:
        Problem: the path is refused, or no file can have it.
    """
    refused = refusal(name, allow_outside=allow_outside)
    if refused is not None:
        raise Problem(refused[0], where=repr(name), remedy=refused[1])
    try:
        path = (root / name).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # too long, links in a circle, characters no file name has
        raise Problem(f"no file can have this path ({error})", where=repr(name), remedy="correct it") from error
    if not allow_outside and not path.is_relative_to(root):
        raise Problem("the path leaves the root through a link", where=repr(name), remedy=_ALLOW)
    return path


def stat_plain(root: Path, name: str) -> os.stat_result | None:
    """Return the status of a file that no link leads to, under a resolved root; None: ask `safe_join`.

    A quick proof, as in `refusal`: without links and `..` there is nothing to resolve, and nothing leaves the root.
    """
    if _SUSPECT.search(name):
        return None
    path, parts = os.fspath(root), name.split("/")
    try:
        for part in parts[:-1]:
            path = f"{path}/{part}"
            if stat.S_ISLNK(os.lstat(path).st_mode):
                return None
        status = os.lstat(f"{path}/{parts[-1]}")
    except (OSError, ValueError):
        return None
    return None if stat.S_ISLNK(status.st_mode) else status
