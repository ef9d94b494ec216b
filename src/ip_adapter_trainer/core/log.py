"""Messages to people: short lines on standard error, once per group of processes."""

from __future__ import annotations

import io
import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from typing import Any

from ip_adapter_trainer.core.redact import redacted

# It advises kernels from the hub as soon as accelerate imports it, on machines without a GPU.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def say(line: str) -> None:
    """Print a line to standard error, from the first process only."""
    if os.environ.get("RANK", "0") == "0":
        print(redacted(line), file=sys.stderr, flush=True)


@contextmanager
def say_after(seconds: float, line: str) -> Iterator[None]:
    """Print a line, from the first process of each machine, if this block takes longer than `seconds`."""
    timer = threading.Timer(seconds, lambda: print(redacted(line), file=sys.stderr, flush=True))
    timer.daemon = True
    if os.environ.get("LOCAL_RANK", "0") == "0":
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


class _Patient(io.FileIO):
    def write(self, data: Any) -> int:
        """Drop what is refused."""
        with suppress(OSError):
            super().write(data)
        return len(data)


@contextmanager
def patient_stderr() -> Iterator[None]:
    """Drop what standard error does not take in this block.

    A log lies on a full disk, say, or the launcher that read the pipe is gone. Otherwise a progress bar would end the
    run, and what is left in a buffer would change the exit code.
    """
    if sys.stderr is not sys.__stderr__:  # someone else's, not the system's
        yield
        return
    raw: Any = _Patient(2, "w", closefd=False)  # typed as raw, which wrappers take
    with redirect_stderr(io.TextIOWrapper(raw, "utf-8", "backslashreplace", write_through=True)):
        yield


def quiet_loading() -> None:
    """Turn off the loading bars of diffusers and transformers, and their advice to install what is not needed.

    Their bars would tear ours.
    """
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    for handler in transformers_logging.get_logger("transformers").handlers:
        handler.addFilter(_is_no_advice)


@contextmanager
def silent_diffusers() -> Iterator[None]:
    """Let diffusers log errors only in this block: its warnings on weights and casts are judged elsewhere."""
    from diffusers.utils import logging as diffusers_logging

    own = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(own)


def _is_no_advice(record: logging.LogRecord) -> bool:
    """Image processors fall back to Pillow without torchvision, which is what this package was measured with."""
    return "requires torchvision" not in record.getMessage()
