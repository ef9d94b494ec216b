"""What it costs to look at every step whether its numbers are finite and usual: exactly the operations that it adds.

    OMP_NUM_THREADS=1 taskset -c 0 python -m benchmarks.finite_cost [--rounds 5]

SD1.5 at half its width, 256 px, one image, bf16, random weights, rows encoded beforehand, on one core of a CPU.
Processor time, not time on the clock. The norm is not counted: clipping needs it whatever is looked at.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.memory_budget import step
from benchmarks.memory_cost import SIDE_PX, SIZE, random_model
from benchmarks.sizes import SIZES
from ip_adapter_trainer.model import Model
from ip_adapter_trainer.train import optim
from ip_adapter_trainer.train.config import LeanConfig, OptimConfig
from ip_adapter_trainer.train.lean import lean
from ip_adapter_trainer.train.spikes import WINDOW, Spikes

SAVE_STEPS = 2000  # the default of --save_steps


def seconds(work: Callable[[], Any], rounds: int, repeats: int = 1) -> float:
    """Median processor time of some work, done so often a round; the first round is not counted."""
    found = []
    for _ in range(rounds + 1):
        began = time.process_time()
        for _ in range(repeats):
            work()
        found.append((time.process_time() - began) / repeats)
    return statistics.median(found[1:])


class Looks:
    """The looks at a step's numbers, on the gradients and the optimizer of a model's adapter."""

    def __init__(self, model: Model) -> None:
        self.parameters = [p for p in model.adapter.parameters() if p.requires_grad]
        self.gradients = optim.Gradients(self.parameters)
        self.optimizer = optim.make_optimizer(model.adapter, OptimConfig())
        self.norm, self.good = torch.tensor(1.0), torch.tensor(0.0)
        self.spikes = Spikes()
        for number in range(WINDOW):
            self.spikes.excess(1.0 + number / WINDOW)

    def update(self) -> None:
        """The optimizer's step, unlooked at."""
        self.optimizer.step()

    def update_if_finite(self) -> None:
        """The optimizer's step, if the gradients were finite."""
        optim.step_if_finite(self.optimizer, self.good)

    def look(self) -> None:
        """Loss and norm are judged, the host compares the loss with the last ones."""
        self.gradients.report(self.norm)
        self.spikes.excess(1.5)

    def before_saving(self) -> None:
        """All weights and moments."""
        moments = [value for entry in self.optimizer.state.values() for value in entry.values()]
        assert optim.all_within(optim.LARGEST_WEIGHT, self.parameters)
        assert optim.all_within(optim.LARGEST_MOMENT, moments)


def measure(rounds: int) -> dict[str, float]:
    """Seconds of a step and of each look."""
    model = random_model("none")
    with model.attached(), lean(model, LeanConfig()):
        whole = seconds(lambda: step(model, SIZES[SIZE], SIDE_PX, 1), rounds)
    looks = Looks(model)
    turns: dict[str, list[float]] = {"plain": [], "if finite": []}
    for _ in range(4 * rounds):  # by turns: their difference is far below what the machine's speed changes by
        turns["plain"].append(seconds(looks.update, 1))
        turns["if finite"].append(seconds(looks.update_if_finite, 1))
    plain, judged = (statistics.median(turns[name]) for name in ("plain", "if finite"))
    return {
        "forward and backward": whole,
        "optimizer, plain": plain,
        "optimizer, if finite": judged,
        "loss, norm and spike": seconds(looks.look, rounds, repeats=200),
        "before a checkpoint": seconds(looks.before_saving, rounds),
    }


def main() -> None:
    """Prints the seconds of each, and the share of a step that all looks take."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    found = measure(parser.parse_args().rounds)
    for name, took_s in found.items():
        print(f"{name:<24}{1e3 * took_s:>12.3f} ms")
    plain = found["forward and backward"] + found["optimizer, plain"]
    added = found["optimizer, if finite"] - found["optimizer, plain"] + found["loss, norm and spike"]
    added += found["before a checkpoint"] / SAVE_STEPS
    print(f"{'added to a step':<24}{1e3 * added:>12.3f} ms, {100 * added / plain:.3f} % of it (limit 1 %)")


if __name__ == "__main__":
    main()
