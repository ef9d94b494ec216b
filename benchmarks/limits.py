"""What no noise can move: floating-point operations, counted; and the roof that a device can reach, measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.our_step import OurStep
from benchmarks.published_step import PublishedStep
from benchmarks.rows import make_batch
from benchmarks.sizes import SIZES, build, projector_weights
from benchmarks.worker import Meter
from ip_adapter_trainer.train.run_plan import make_plan

_MATMULS_OF_ATTENTION = ("bmm", "baddbmm", "scaled_dot_product", "flash_attention", "efficient_attention")
_REPEATS = 7


@dataclass(frozen=True)
class Flops:
    """Operations of one image's training step, 1 MAC = 2 FLOP."""

    total: int
    attention: int  # of the total: products of queries with keys and of weights with values

    @classmethod
    def of(cls, counter: FlopCounterMode) -> Flops:
        """What a counter saw."""
        by_kind = {str(kind): count for kind, count in counter.get_flop_counts()["Global"].items()}
        attention = sum(n for kind, n in by_kind.items() if any(part in kind for part in _MATMULS_OF_ATTENTION))
        return cls(sum(by_kind.values()), attention)


def count(size_name: str, side_px: int) -> tuple[Flops, Flops]:
    """Operations of the published step's forward and backward pass, and of ours, on the meta device (no weights)."""
    size, meta = SIZES[size_name], torch.device("meta")
    batch, weights = make_batch(size, side_px, 1, meta), projector_weights(size, meta)
    published = PublishedStep(build(size, meta), weights, "no", meta)
    draws = published.draws(batch)
    with FlopCounterMode(display=False) as theirs:
        published.loss(batch, draws).backward()
    ours = OurStep(size, build(size, meta), weights, "no", meta)
    encoded = replace(batch, inputs=ours.encode(batch))
    with ours.model.attached(), FlopCounterMode(display=False) as mine:
        ours.loss(encoded).backward()
    return Flops.of(theirs), Flops.of(mine)


def checkpoint_bytes(size_name: str) -> tuple[int, int]:
    """Bytes of the tensors in a published save and in our checkpoint, counted on the meta device (no weights)."""
    size, meta = SIZES[size_name], torch.device("meta")
    weights = projector_weights(size, meta)
    model = PublishedStep(build(size, meta), weights, "no", meta).model
    saved = {id(tensor): tensor.nbytes for tensor in model.state_dict(keep_vars=True).values()}  # shared ones once
    moments = sum(2 * p.nbytes for p in model.trained().values())
    ours = OurStep(size, build(size, meta), weights, "no", meta)
    plan = make_plan(ours.model, ours.config(Path("none")), rows=1, images_per_step=1)
    return sum(saved.values()) + moments, plan.checkpoint_bytes


def _rate(run: Callable[[], Tensor], flops: int, device: str) -> float:
    meter, times = Meter(torch.device(device)), []
    for _ in range(_REPEATS):
        meter.start()
        run()
        times.append(meter.stop())
    return flops / min(times)


@torch.no_grad()
def roof(device: str) -> float:
    """FLOP/s in bf16: on a GPU of a large matrix product, on a CPU of the best of three 3x3 convolutions of SD1.5."""
    kinds: dict[str, Any] = {"dtype": torch.bfloat16, "device": device}
    if device == "cuda":
        a = torch.randn(8192, 8192, **kinds)
        return _rate(lambda: a @ a, 2 * 8192**3, device)
    rates = []
    for channels, side in ((320, 32), (640, 32), (1280, 16)):
        x = torch.randn(4, channels, side, side, **kinds).to(memory_format=torch.channels_last)
        weight = torch.randn(channels, channels, 3, 3, **kinds).to(memory_format=torch.channels_last)
        rates.append(_rate(partial(F.conv2d, x, weight, padding=1), 18 * x.numel() * channels, device))
    return max(rates)
