"""The images that a process takes at once: as many of its share of a step as memory holds, unless a flag says it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch

from ip_adapter_trainer.core.log import say
from ip_adapter_trainer.core.values import Batch
from ip_adapter_trainer.loading.config import part_of
from ip_adapter_trainer.runtime.launch import Runtime
from ip_adapter_trainer.runtime.memory import free_bytes, kept_bytes
from ip_adapter_trainer.train.config import LeanConfig, TrainConfig
from ip_adapter_trainer.train.data import TrainingData
from ip_adapter_trainer.train.fixed import joined
from ip_adapter_trainer.train.lean import lean
from ip_adapter_trainer.train.starting import StartingPoint

if TYPE_CHECKING:
    from ip_adapter_trainer.train.step import Step

_MARGIN = 1.25  # over what is kept: temporaries, workspaces, fragments
_RECOMPUTED = 1 / 3  # of an image's activations, at most (docs/performance.md, Small cards)
_TRAINED_BYTES = 12  # of each trained weight: a gradient and two moments


@dataclass(frozen=True)
class Fit:
    """One way for a process to take its images of a step."""

    images: int  # of a micro-batch
    recomputed: bool = False  # whether activations are recomputed


def fitted(config: TrainConfig, step: Step, data: TrainingData, runtime: Runtime, point: StartingPoint) -> Fit:
    """Return how a process takes its images of a step; model and data do so from now on.

    A given batch size wins, then what a resumed run did. Else the bytes that one image keeps are counted in a forward
    pass, and on a GPU a step is tried. All processes do what the one with the least memory must.
    """
    images = config.micro_images
    one = [] if config.train_batch_size else data.seen.batches(1)
    if not one:  # where no row can be read, the loop says so
        return Fit(images, config.gradient_checkpointing)
    ways = list(_ways(images, config.gradient_checkpointing))
    trial = _Trial(step, one[0], part_of(config, LeanConfig).model_copy(update={"compile": "off"}))
    before = point.state.get("fit") if point.state else None
    known = next((i for i, way in enumerate(ways) if asdict(way) == before), None)
    at = runtime.highest(trial.counted(ways, runtime) if known is None else known)
    while runtime.device.type == "cuda" and runtime.highest(int(not trial.passes(ways[at]))) and at + 1 < len(ways):
        at += 1
        say(f"the device's memory was not enough for that: {ways[at].images} at a time")
    trial.prepare(ways[at])
    data.take_at_once(ways[at].images)
    return ways[at]


def _ways(images: int, recomputed: bool) -> Iterator[Fit]:
    """Yield the ways to take some images, from the fastest to the one that needs least memory."""
    divisors = [n for n in range(images, 0, -1) if images % n == 0]
    if not recomputed:
        yield from (Fit(n) for n in divisors)
    yield from (Fit(n, recomputed=True) for n in divisors)


class _Trial:
    """A step on copies of one image, of which nothing is kept."""

    def __init__(self, step: Step, one: Batch, layers: LeanConfig) -> None:
        self._step, self._one, self._layers = step, one, layers
        trained = sum(p.numel() for p in step.model.adapter.parameters() if p.requires_grad)
        self._trained_bytes = _TRAINED_BYTES * trained

    def counted(self, ways: list[Fit], runtime: Runtime) -> int:
        """Return the number of the first way whose activations fit, by those that one image keeps; or of the last."""
        free = free_bytes(runtime.device, runtime.local_world)
        model = self._step.model
        with model.attached(), lean(model, self._layers), kept_bytes(model.denoiser.net, model.adapter) as kept:
            self._step(self._one)

        def need(way: Fit) -> float:
            """Return the bytes that a way needs."""
            return self._trained_bytes + _MARGIN * way.images * kept[0] * (_RECOMPUTED if way.recomputed else 1)

        at = next((i for i, way in enumerate(ways) if need(way) <= free), len(ways) - 1)
        how = f"{ways[at].images} of {ways[0].images} images at a time" + ", recomputed" * ways[at].recomputed
        why = f"one keeps {kept[0] / 1e9:.2g} GB, and {free / 1e9:.3g} GB are free"
        say(f"{how}: {why} (another number by --train_batch_size)")
        return at

    def prepare(self, way: Fit) -> None:
        """Make the model recompute activations if a way does."""
        if way.recomputed:
            self._step.model.checkpoint_activations()

    def passes(self, way: Fit) -> bool:
        """Return whether a step goes through on a GPU, with room for the moments that come later."""
        self.prepare(way)
        model, device = self._step.model, self._step.device
        try:
            with model.attached(), lean(model, self._layers):
                moments = torch.empty(self._trained_bytes * 2 // 3, dtype=torch.uint8, device=device)
                self._step(joined([self._one] * way.images)).backward()
                del moments
        except torch.OutOfMemoryError:
            return False
        finally:
            model.adapter.zero_grad()
            torch.cuda.empty_cache()
        return True
