"""Which kinds of operation our step spends its time on, by PyTorch's profiler, and how fast its products run.

python -m benchmarks.where_time_goes --images 4
"""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import replace

import torch
from torch.profiler import profile

from benchmarks import limits
from benchmarks.our_step import OurStep
from benchmarks.rows import at_step, make_batch
from benchmarks.sizes import SIZES, build, projector_weights
from ip_adapter_trainer.core.log import quiet_loading
from ip_adapter_trainer.train.config import LeanConfig
from ip_adapter_trainer.train.lean import lean

KINDS = {
    "products and convolutions": ("aten::mm", "aten::addmm", "aten::mkldnn_convolution", "aten::convolution_backward"),
    "attention": ("aten::bmm", "scaled_dot_product", "softmax"),
    "norms": ("_norm",),
    "copies": ("aten::copy_", "aten::fill_", "aten::cat"),
}
REST = "elementwise and the rest"
WARM_STEPS, STEPS = 3, 3


def kind_of(operation: str) -> str:
    """The kind that an operation's own time is counted under."""
    return next((kind for kind, parts in KINDS.items() if any(part in operation for part in parts)), REST)


def step_times(size_name: str, side_px: int, images: int, precision: str) -> Counter[str]:
    """Seconds of one step's forward and backward pass on a CPU, by kind of operation."""
    size, cpu = SIZES[size_name], torch.device("cpu")
    ours = OurStep(size, build(size, cpu), projector_weights(size, cpu), precision, cpu)
    batch = make_batch(size, side_px, images, cpu)
    batch = replace(batch, inputs=ours.encode(batch))
    ours.release_encoders()

    def train(steps: range) -> None:
        for step in steps:
            ours.loss(at_step(batch, step)).backward()
            ours.model.adapter.zero_grad()

    with ours.model.attached(), lean(ours.model, LeanConfig()):
        train(range(WARM_STEPS))
        with profile() as watched:
            train(range(WARM_STEPS, WARM_STEPS + STEPS))
    spent: Counter[str] = Counter()
    for event in watched.key_averages():
        spent[kind_of(event.key)] += event.self_cpu_time_total / 1e6 / STEPS
    return spent


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="sd15")
    parser.add_argument("--side_px", type=int, default=256)
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--mixed_precision", choices=("no", "bf16"), default="bf16")
    args = parser.parse_args()
    quiet_loading()
    _, counted = limits.count(args.size, args.side_px)
    spent, roof = step_times(args.size, args.side_px, args.images, args.mixed_precision), limits.roof("cpu")
    print("| kind of operation | s a step | share |\n|---|---|---|")
    for kind, seconds in spent.most_common():
        print(f"| {kind} | {seconds:.3f} | {seconds / spent.total():.1%} |")
    print(f"| all | {spent.total():.3f} | |")
    rate = (counted.total - counted.attention) * args.images / spent["products and convolutions"]
    print(f"\nproducts and convolutions at {rate / 1e9:,.0f} GFLOP/s; the roof in bf16 is {roof / 1e9:,.0f}")


if __name__ == "__main__":
    main()
