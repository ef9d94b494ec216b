"""metrics.jsonl of a run that goes on from a checkpoint: lines of later steps are taken back, to be written again."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from ip_adapter_trainer.core.errors import Problem
from ip_adapter_trainer.storage.documents import json_of
from ip_adapter_trainer.storage.files import NotRegularError, open_regular
from ip_adapter_trainer.storage.lines import Lines

METRICS = "metrics.jsonl"
_MAX_LINE_BYTES = 2**16  # a line takes some hundred


def cut_metrics(output: Path, step: int, validated: int) -> None:
    """Take back the lines of later steps, and what a kill tore at the end.

    The run goes on from `step`; at -1 no line stays. A validation's numbers of that step itself stay only where the
    checkpoint knows of them, as its last one is that of step `validated`: else it is done again.

    Raises:
        Problem: what stands in the file's place is no file.
    """
    file = output / METRICS
    try:
        with open_regular(file) as opened:
            size_bytes = _bytes_of(opened, step, validated)
    except FileNotFoundError:
        return
    except NotRegularError as error:
        raise Problem("no regular file", where=str(file), remedy="remove it") from error
    Lines(file).cut(size_bytes)


def _bytes_of(opened: BinaryIO, step: int, validated: int) -> int:
    """Length of the lines until a step; what is no line of ours counts only where one of these comes after it."""
    size_bytes = read_bytes = 0
    for line in iter(partial(opened.readline, _MAX_LINE_BYTES), b""):
        read_bytes += len(line)
        row = _row_of(line)
        if row is None:
            continue
        is_known = "lr" in row or validated == step  # a validation's line has no learning rate
        if row["step"] > step or (row["step"] == step and not is_known):
            break
        size_bytes = read_bytes
    return size_bytes


def _row_of(line: bytes) -> dict[str, Any] | None:
    """The numbers of a whole line; None: torn, or no line of ours."""
    try:
        row = json_of(line.decode())
    except ValueError:
        return None
    is_ours = line.endswith(b"\n") and isinstance(row, dict) and type(row.get("step")) is int
    return row if is_ours else None
