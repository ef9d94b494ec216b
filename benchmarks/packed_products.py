"""Products of SD1.5's UNet over few positions, beside the same with weights that oneDNN laid out beforehand.

    OMP_NUM_THREADS=1 taskset -c 0 python -m benchmarks.packed_products

What that would save of a step's products, and the memory that it takes: the forward and the backward pass want a layout
each, so that a weight is held twice. Not part of the trainer: the memory is worth more (docs/performance.md).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.convolutions import least_ms, print_table

# positions, entries of an input, of an output: linear layers, and 3x3 convolutions as products
SHAPES = (
    (64, 1280, 1280), (64, 1280, 10240), (64, 11520, 1280), (64, 23040, 1280), (256, 1280, 1280), (256, 1280, 10240),
    (256, 11520, 1280), (1024, 640, 640), (1024, 640, 5120),
)  # fmt: skip


def packed(weight: Tensor, positions: int) -> Tensor:
    """A weight [N, K] as oneDNN wants it for products with so many rows."""
    laid_out: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, positions)
    return laid_out


def by_packed(x: Tensor, weight: Tensor) -> Tensor:
    """[M, K] by a packed [N, K] to [M, N]."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return out


def line(positions: int, entries: int, width: int) -> str:
    """A row of the table.

    Raises:
        AssertionError: the two ways differ.
    """
    x, weight, gradient = (
        torch.randn(shape).bfloat16() for shape in ((positions, entries), (width, entries), (positions, width))
    )
    ahead, back = packed(weight, positions), packed(weight.t().contiguous(), positions)
    for found, wanted in ((by_packed(x, ahead), F.linear(x, weight)), (by_packed(gradient, back), gradient @ weight)):
        torch.testing.assert_close(found, wanted, atol=0.5, rtol=0.02)  # sums with a deviation of 8 to 150
    times = (
        least_ms(lambda: F.linear(x, weight)),
        least_ms(lambda: by_packed(x, ahead)),
        least_ms(lambda: gradient @ weight),
        least_ms(lambda: by_packed(gradient, back)),
    )
    saved = times[0] + times[2] - times[1] - times[3]
    cells = [f"{positions} x {entries} x {width}", *(f"{ms:.2f}" for ms in times)]
    return "| " + " | ".join([*cells, f"{saved / (2 * weight.numel() / 1e6):.2f}"]) + " |"


@torch.no_grad()
def main() -> None:
    """Prints the table."""
    titles = ("positions x in x out", "forward, ms", "packed", "backward, ms", "packed", "saved, ms a MB more")
    print_table(titles, (line(*shape) for shape in SHAPES))


if __name__ == "__main__":
    main()
