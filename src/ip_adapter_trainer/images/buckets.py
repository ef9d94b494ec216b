"""Aspect-ratio buckets: the few sizes that images are cut to, each of about the same area."""

from __future__ import annotations

import math
from bisect import bisect
from dataclasses import dataclass, field
from itertools import pairwise

from ip_adapter_trainer.core.values import Size

LATENT_STEP_PX = 8  # pixels per latent in each direction, of every autoencoder here


@dataclass(frozen=True)
class Buckets:
    """Sizes in pixels (height, width), widest first."""

    sizes_px: tuple[Size, ...]
    _limits: tuple[float, ...] = field(init=False, repr=False)  # log-aspects half-way between neighbours

    def __post_init__(self) -> None:
        aspects = [_log_aspect(size) for size in self.sizes_px]
        assert aspects == sorted(aspects) and len(set(aspects)) == len(aspects)
        limits = tuple((low + high) / 2 for low, high in pairwise(aspects))
        object.__setattr__(self, "_limits", limits)

    @classmethod
    def square(cls, resolution_px: int) -> Buckets:
        """Return the one bucket of a run without buckets."""
        return cls(((resolution_px, resolution_px),))

    @classmethod
    def ladder(cls, resolution_px: int, *, step_px: int, max_aspect: float) -> Buckets:
        """Return all sizes with sides in multiples of `step_px` that cannot grow without passing resolution^2 in area.

        Of two sizes of one aspect the larger stays. The square is always among them.

        Raises:
            ValueError: `resolution_px` is no multiple of `step_px`.
        """
        if resolution_px % step_px:
            why = f"resolution {resolution_px} is no multiple of bucket_step_px {step_px}"
            raise ValueError(f"{why}; take a step that divides it and is a multiple of {LATENT_STEP_PX}")
        by_aspect: dict[float, Size] = {}
        for short in range(step_px, resolution_px + 1, step_px):
            long = resolution_px**2 // short // step_px * step_px
            if long <= max_aspect * short:
                by_aspect |= {_log_aspect(size): size for size in ((short, long), (long, short))}
        return cls(tuple(by_aspect[aspect] for aspect in sorted(by_aspect)))

    def __len__(self) -> int:
        return len(self.sizes_px)

    def nearest(self, size_px: Size) -> int:
        """Return the number of the bucket whose log-aspect is nearest to that of (height, width)."""
        return bisect(self._limits, _log_aspect(size_px))


def _log_aspect(size_px: Size) -> float:
    return math.log(size_px[0] / size_px[1])
