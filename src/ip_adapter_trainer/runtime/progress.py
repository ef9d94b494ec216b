"""Progress of long work: a bar on a terminal; in a log, where a bar would be one endless line, lines now and then.

A log gets a line after `FIRST_S`, then one every `EVERY_S`, and the last state at the end.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm

from ip_adapter_trainer.core.log import say

FIRST_S, EVERY_S = 5.0, 30.0


class Progress:
    """Tells how far work has come, in units of which some were done before: "step 120 of 400"; or nothing."""

    def __init__(self, total: int, unit: str, *, initial: int = 0, shown: bool = True) -> None:
        self._total, self._unit, self._done, self._began_at = total, unit, initial, initial
        self._words = ""
        self._bar = tqdm(total=total, initial=initial, unit=unit, dynamic_ncols=True, disable=None if shown else True)
        self._in_lines = shown and not sys.stderr.isatty()
        self._told = initial  # in the last line
        self._began_s = time.monotonic()
        self._due_s = self._began_s + FIRST_S

    def update(self, count: int, words: str = "") -> None:
        """Add so many that are done; `words` tell more of the state, in place of earlier ones."""
        self._done += count
        self._words = words
        self._bar.set_postfix_str(words, refresh=False)
        self._bar.update(count)
        if self._in_lines and time.monotonic() >= self._due_s:
            self._tell()

    def close(self) -> None:
        """Tell the last state and end the bar."""
        if self._in_lines and self._done != self._told:
            self._tell()
        self._bar.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _tell(self) -> None:
        now_s = time.monotonic()
        each_s = (now_s - self._began_s) / max(self._done - self._began_at, 1)
        left_s = each_s * (self._total - self._done)
        parts = [f"{self._unit} {self._done} of {self._total}", self._words]
        parts.append(f"about {spelled(left_s)} left" if left_s else f"in {spelled(now_s - self._began_s)}")
        say(", ".join(filter(None, parts)))
        self._told, self._due_s = self._done, now_s + EVERY_S


def spelled(seconds: float) -> str:
    """Return a time as people say it.

    >>> spelled(42), spelled(200), spelled(9000)
    ('42 s', '3 min', '2.5 h')
    """
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5970 else f"{seconds / 3600:.1f} h"
