"""The results of an evaluation: means with standard errors, paired differences, as a table and as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ip_adapter_trainer.manifest.hold_out import LEAST_IMAGES

PROMPTED, SCALE_0, SHUFFLED = "image_prompt", "scale_0", "shuffled"  # how a row's pictures were drawn
CONDITIONS = (PROMPTED, SCALE_0, SHUFFLED)
CLIP_I, CLIP_T = "clip_i", "clip_t"
Values = Mapping[str, Mapping[str, NDArray[np.float64]]]  # how drawn, metric: [rows], NaN where there is none

_TITLES = {PROMPTED: "image prompt", SCALE_0: "scale 0", SHUFFLED: "shuffled image prompts"}


@dataclass(frozen=True)
class Measure:
    """A mean over rows and its standard error."""

    mean: float
    standard_error: float | None  # None: of one row
    rows: int

    @classmethod
    def of(cls, values: NDArray[np.float64]) -> Measure | None:
        """Return the mean and standard error of the values [rows] that are finite, or None if none is."""
        known = values[np.isfinite(values)]
        if not known.size:
            return None
        error = float(known.std(ddof=1) / known.size**0.5) if known.size > 1 else None
        return cls(float(known.mean()), error, int(known.size))


Measures = dict[str, Measure | None]  # by metric


@dataclass(frozen=True)
class Evaluation:
    """Scores of pictures drawn with the image prompt, beside the same seeds without it and with another row's."""

    protocol: dict[str, Any]
    scores: dict[str, Measures]  # by how the pictures were drawn
    gains: dict[str, Measures]  # of the image prompt over each of the others, paired by row
    faults: list[str]  # of rows that were left out
    seconds: float

    @classmethod
    def of(cls, values: Values, protocol: dict[str, Any], faults: list[str], seconds: float) -> Evaluation:
        """Evaluate the values of every row."""
        scores = {how: {name: Measure.of(v) for name, v in metrics.items()} for how, metrics in values.items()}
        gains = {
            how: {name: Measure.of(values[PROMPTED][name] - v) for name, v in metrics.items()}
            for how, metrics in values.items()
            if how != PROMPTED
        }
        return cls(protocol, scores, gains, faults, seconds)

    def __str__(self) -> str:
        plan, how = self.protocol, self.protocol["how"]
        lines = [
            f"{plan['rows']} rows, {plan['pictures']} pictures each, seed {plan['seed']}; {how['scheduler']}, "
            f"{how['steps']} steps, guidance {how['guidance_scale']:g}, scale {how['scale']:g}",
            f"scored by {plan['clip_model']}; CLIP-T is 2.5 max(cosine, 0); ± one standard error over rows",
            "",
            f"{'':<42}{'CLIP-I':^18}{'CLIP-T':^18}".rstrip(),
        ]
        lines += [_line(_TITLES[how], measures, "") for how, measures in self.scores.items()]
        over = f"{_TITLES[PROMPTED]} over "
        lines += [_line(over + _TITLES[how], measures, "+") for how, measures in self.gains.items()]
        if plan["images"] < LEAST_IMAGES:
            none = "" if plan["images"] > 1 else "; there is none to shuffle with"
            lines += ["", f"images: {plan['images']}, too few to judge by, {LEAST_IMAGES} are needed{none}"]
        if self.faults:
            lines += ["", f"faults: {len(self.faults)}, the first: {self.faults[0]}"]
        return "\n".join(lines)


def _line(title: str, measures: Measures, sign: str) -> str:
    return f"{title:<42}" + "".join(f"{_cell(m, sign):^18}" for m in measures.values()).rstrip()


def _cell(measure: Measure | None, sign: str) -> str:
    if measure is None:
        return "-"
    error = "" if measure.standard_error is None else f" ± {measure.standard_error:.4f}"
    return f"{measure.mean:{sign}.4f}{error}"
