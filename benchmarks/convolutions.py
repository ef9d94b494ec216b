"""Convolutions of SD1.5's UNet as PyTorch computes them on a CPU, beside matrix products, forward and backward.

    OMP_NUM_THREADS=1 taskset -c 0 python -m benchmarks.convolutions

Channels-last bf16, 3x3 kernels, the least of five turns. The column "taken" is what `product_pays` says.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ip_adapter_trainer.nn.products import product_backward, product_forward, product_pays

# in and out channels, side of the picture in latents, images
SHAPES = (
    (2560, 1280, 8, 1), (1280, 1280, 8, 1), (1280, 1280, 4, 1), (1280, 640, 16, 1), (640, 640, 16, 1),
    (2560, 1280, 8, 4), (1280, 1280, 8, 4), (1280, 1280, 16, 4), (640, 640, 16, 4), (320, 320, 32, 1),
)  # fmt: skip
GEOMETRY = ((1, 1), (1, 1))


def least_ms(compute: Callable[[], Tensor]) -> float:
    """Milliseconds of the fastest of five turns, after one that is not counted."""
    compute()
    turns = []
    for _ in range(5):
        began = time.perf_counter()
        compute()
        turns.append(time.perf_counter() - began)
    return 1000 * min(turns)


def print_table(titles: Sequence[str], lines: Iterable[str]) -> None:
    """Prints lines as they come."""
    print("| " + " | ".join(titles) + " |\n" + "|---" * len(titles) + "|")
    for row in lines:
        print(row, flush=True)


def line(channels: int, width: int, side: int, images: int) -> str:
    """A row of the table."""
    x, weight, gradient = (
        torch.randn(shape).to(torch.bfloat16).to(memory_format=torch.channels_last)
        for shape in ((images, channels, side, side), (width, channels, 3, 3), (images, width, side, side))
    )
    backward = torch.ops.aten.convolution_backward
    options = [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, False, False]
    found = (
        least_ms(lambda: F.conv2d(x, weight, None, *GEOMETRY)),
        least_ms(lambda: product_forward(x, weight, None, GEOMETRY)),
        least_ms(lambda: backward(gradient, x, weight, None, *options)[0]),
        least_ms(lambda: product_backward(gradient, weight, x.shape, GEOMETRY)),
    )
    taken = "yes" if product_pays(x, weight, (1, 1), (1, 1), 1) else ""
    cells = [f"{channels} to {width}", str(images * side * side), *(f"{ms:.1f}" for ms in found), taken]
    return "| " + " | ".join(cells) + " |"


@torch.no_grad()
def main() -> None:
    """Prints the table."""
    titles = ("channels", "positions", "forward, ms", "as product", "backward, ms", "as product", "taken")
    print_table(titles, (line(*shape) for shape in SHAPES))


if __name__ == "__main__":
    main()
