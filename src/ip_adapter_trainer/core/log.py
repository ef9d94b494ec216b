"""What the program says to people: short lines on standard error, once per group of processes."""

from __future__ import annotations

import os
import sys


def say(line: str) -> None:
    """Prints a line from the first process only."""
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr, flush=True)


def quiet_loading() -> None:
    """Turns off the loading bars of diffusers and transformers, which would tear ours."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
