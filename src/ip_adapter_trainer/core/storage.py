"""What writers say when a disk refuses: each in its own way, here as one."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from ip_adapter_trainer.core.errors import StorageProblem, first_line

_OF_THE_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG}


def refusals() -> tuple[type[Exception], ...]:
    """What a writer of files or tensors raises: `torch.save` says of a full disk only that its archive has a wrong
    length, in a RuntimeError."""
    from safetensors import SafetensorError

    return OSError, SafetensorError, RuntimeError


def reason_of(error: Exception) -> str:
    """Why a file was not written, in a line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return first_line(error)


@contextmanager
def told_as_storage() -> Iterator[None]:
    """A disk that is full, read-only or broken is a problem of storage, whoever wrote.

    Raises:
        StorageProblem: in place of what the system said.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _OF_THE_DISK:
            raise
        remedy = "make room, or choose another folder"
        raise StorageProblem(reason_of(error), where=str(error.filename or ""), remedy=remedy) from error
