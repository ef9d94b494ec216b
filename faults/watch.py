"""A command seen from inside: `python -m faults.watch COMMAND ...` does what `ip-adapter COMMAND ...` does.

What it sees goes, a JSON object a line, into `seen-PID.jsonl` of the working directory: every file opened and every
address asked for, the (index, row) pairs of each batch trained on, and at the end the most memory that was held.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

_REACHES_OUT = ("socket.connect", "socket.getaddrinfo", "socket.sendto", "urllib.Request", "ftplib.connect")


def seen(folder: Path, pid: int) -> list[dict[str, Any]]:
    """What was seen of a process that was started in a folder."""
    return [json.loads(line) for line in _file(folder, pid).read_text().splitlines()]


def _file(folder: Path, pid: int) -> Path:
    return folder / f"seen-{pid}.jsonl"


def main() -> None:
    """Watches the command that the arguments name."""
    notes = os.open(_file(Path.cwd(), os.getpid()), os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(**what: Any) -> None:
        os.write(notes, json.dumps(what).encode() + b"\n")

    def audit(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(args[0], str | bytes):
            note(opened=os.path.realpath(os.fsdecode(args[0])))
        elif event in _REACHES_OUT:
            note(asked=event)

    if sys.argv[1:2] == ["train"]:  # which needs torch all the same
        _note_batches(note)
    sys.addaudithook(audit)
    from ip_adapter_trainer.cli import main as command

    try:
        command()
    finally:
        note(peak_bytes=_peak_bytes())


def _note_batches(note: Any) -> None:
    from ip_adapter_trainer.train.step import Step

    own = Step.__call__

    def noted(self: Step, batch: Any) -> Any:
        note(index=batch.index.tolist(), row=batch.row.tolist())
        return own(self, batch)

    Step.__call__ = noted  # type: ignore[method-assign]


def _peak_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


if __name__ == "__main__":
    main()
