"""A disk that refuses is told as a problem of storage."""

from __future__ import annotations

import errno
import os

import pytest

from ip_adapter_trainer.core.errors import StorageProblem
from ip_adapter_trainer.storage.disk import as_storage_problem


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EIO])
def test_a_disk_that_refuses_is_a_problem_of_storage(code: int) -> None:
    with pytest.raises(StorageProblem, match=os.strerror(code)) as caught, as_storage_problem():
        raise OSError(code, os.strerror(code), "/there")
    assert caught.value.exit_code == 4 and caught.value.fault.where == "/there"


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(FileNotFoundError), as_storage_problem():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "/there")
