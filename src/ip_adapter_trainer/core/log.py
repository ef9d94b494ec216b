"""What the program says to people: short lines on standard error, once per group of processes."""

from __future__ import annotations

import logging
import os
import sys

from ip_adapter_trainer.core.shown import redacted

# It advises kernels from the hub as soon as accelerate imports it, on machines without a GPU.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def say(line: str) -> None:
    """Prints a line from the first process only."""
    if os.environ.get("RANK", "0") == "0":
        print(redacted(line), file=sys.stderr, flush=True)


def quiet_loading() -> None:
    """Turns off the loading bars of diffusers and transformers, which would tear ours, and advice to install what is
    not needed."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    for handler in transformers_logging.get_logger("transformers").handlers:
        handler.addFilter(_is_no_advice)


def _is_no_advice(record: logging.LogRecord) -> bool:
    """Image processors fall back to Pillow without torchvision, which is what this package was measured with."""
    return "requires torchvision" not in record.getMessage()
