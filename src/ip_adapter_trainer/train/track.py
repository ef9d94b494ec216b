"""Numbers to metrics.jsonl always, to accelerate's trackers by name, and to people as progress.

metrics.jsonl holds only what the training determines, so that a resumed run ends with the same bytes (`train.metrics`);
speeds go to the tracker and to people.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ip_adapter_trainer.runtime.launch import Runtime
from ip_adapter_trainer.runtime.progress import Progress
from ip_adapter_trainer.storage.lines import Lines
from ip_adapter_trainer.train.metrics import METRICS
from ip_adapter_trainer.train.trackers import Trackers


class Stopwatch:
    """Share of time spent waiting for data, and images per second, since the last reading."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._waited_s = 0.0
        self._images = 0

    def waited(self, seconds: float) -> None:
        """Add time in which the step had no data."""
        self._waited_s += seconds

    def trained(self, images: int) -> None:
        """Add images that went through a step."""
        self._images += images

    def read(self) -> dict[str, float]:
        """Return `images_per_s` and `data_wait_share` since the last call, and begin anew."""
        now = time.monotonic()
        spent_s = max(now - self._began, 1e-9)
        speeds = {"images_per_s": self._images / spent_s, "data_wait_share": self._waited_s / spent_s}
        self._began, self._waited_s, self._images = now, 0.0, 0
        return speeds


class Track:
    """Reports of one run; only the main process writes."""

    def __init__(self, runtime: Runtime, folder: Path, total_steps: int, first_step: int) -> None:
        self._runtime, self._lines = runtime, Lines(folder / METRICS)
        self._trackers = Trackers(runtime.accelerator)
        self._pending: list[tuple[int, dict[str, float]]] = []
        self.stopwatch = Stopwatch()
        self._progress = Progress(total_steps, "step", initial=first_step, shown=runtime.is_main)
        self._speeds = ""  # the last ones that were read, for people

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Note the numbers of one optimizer step."""
        self._pending.append((step, dict(values)))
        self._tell(1, values["loss"])

    def flush(self) -> None:
        """Write the pending lines; report the last step to the trackers and the progress bar, with the speeds."""
        if not self._pending or not self._runtime.is_main:
            self._pending.clear()
            return
        rows = [{"step": step, **values} for step, values in self._pending]
        self._pending.clear()
        self._append(rows)
        speeds = self.stopwatch.read()
        last = {k: v for k, v in rows[-1].items() if k != "step"}
        self._report(int(rows[-1]["step"]), {**last, **speeds})
        waiting = f"{100 * speeds['data_wait_share']:.0f} % waiting for data"
        self._speeds = f", {speeds['images_per_s']:.3g} images/s, {waiting}"
        self._tell(0, last["loss"])

    def _tell(self, steps: int, loss: float) -> None:
        self._progress.update(steps, f"loss {loss:.4f}{self._speeds}")

    def event(self, step: int, values: Mapping[str, float]) -> None:
        """Write numbers that do not come every step, such as a validation's, at once."""
        self.flush()
        if self._runtime.is_main:
            self._append([{"step": step, **values}])
            self._report(step, dict(values))

    def image(self, step: int, name: str, image: Any) -> None:
        """Hand an image to the trackers that take images."""
        import numpy as np

        pixels = np.asarray(image)[None]

        def report(tracker: Any) -> None:
            """Report to a tracker if it takes images."""
            if hasattr(tracker, "log_images"):
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({name: pixels}, step=step, **layout)

        self._trackers.report(report)

    def _append(self, rows: list[dict[str, float]]) -> None:
        known = [{k: v if math.isfinite(v) else None for k, v in row.items()} for row in rows]  # JSON has no NaN
        self._lines.add("".join(json.dumps(row) + "\n" for row in known))

    def _report(self, step: int, values: dict[str, float]) -> None:
        self._trackers.report(lambda tracker: tracker.log(values, step=step))

    def metrics_bytes(self) -> int:
        """Return the length of metrics.jsonl with everything flushed, for `take_back`."""
        self.flush()
        return self._lines.size_bytes if self._runtime.is_main else 0

    def take_back(self, metrics_bytes: int) -> None:
        """Cut metrics.jsonl to an earlier length."""
        if self._runtime.is_main:
            self._lines.cut(metrics_bytes)

    def close(self) -> None:
        """End the progress and the trackers; try lines that wait for room a last time."""
        self.flush()
        self._lines.add("")
        self._progress.close()
        self._trackers.close()
