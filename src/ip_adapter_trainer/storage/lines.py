"""Files of lines that grow while a run goes on, and wait when the disk is full."""

from __future__ import annotations

import os
from pathlib import Path

from ip_adapter_trainer.core.log import say
from ip_adapter_trainer.storage.disk import reason_of


class Lines:
    """A file that whole lines are appended to; what the disk refuses is kept and written before the next ones.

    Attributes:
        path: of the file, whose folder is made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._left = b""  # not yet written
        self._is_midway = False  # in a line of its own

    def add(self, lines: str) -> None:
        """Append lines, each with its end, by one write where the disk takes them, as processes may share the file.

        Without new ones, those that wait are tried again.
        """
        if not lines and not self._left:
            return
        was_refused, self._left = bool(self._left), self._left + lines.encode()
        try:
            self._write()
        except OSError as error:
            if not was_refused:
                say(f"{self.path} is not written: {reason_of(error)}; its lines wait until it can be")
        else:
            if was_refused:
                say(f"{self.path} is written again, with the lines that waited")

    @property
    def size_bytes(self) -> int:
        """Length of the file with all lines."""
        return len(self._left) + (self.path.stat().st_size if self.path.exists() else 0)

    def cut(self, size_bytes: int) -> None:
        """Cut the file, and the lines that wait for it, to a length in bytes."""
        written_bytes = self.size_bytes - len(self._left)
        self._left = self._left[: max(size_bytes - written_bytes, 0)]
        if written_bytes > size_bytes:
            with self.path.open("r+b") as file:
                file.truncate(size_bytes)

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 1))
            if not self._is_midway and file.read(1) not in (b"", b"\n"):
                file.write(b"\n")  # a kill tore the last line
            while self._left:  # a disk with little room takes a part and says nothing
                self._left = self._left[file.write(self._left) :]
                self._is_midway = bool(self._left)
