"""What compiling a block is worth on one core of a CPU: two blocks of SD1.5's UNet at 256 px, forward and backward.

    OMP_NUM_THREADS=1 taskset -c 0 python -m benchmarks.compiled_blocks [--rounds 20]

Frozen bf16 blocks of width 320 on 32 x 32 latents, the input's gradient alone wanted. Processor time of the block as
it is, lean, and compiled, whose output and gradient are compared with those of the block as it is.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from ip_adapter_trainer.nn.compiled import compiled_blocks
from ip_adapter_trainer.nn.lean import lean_layers

WIDTH, SIDE, CONTEXT, TEXT_TOKENS, EMBEDDING = 320, 32, 768, 77, 1280
Step = Callable[[], tuple[Tensor, Tensor]]  # gives output and the input's gradient


def _resnet(images: int) -> tuple[nn.Module, tuple[Any, ...]]:
    block = ResnetBlock2D(in_channels=WIDTH, temb_channels=EMBEDDING).to(memory_format=torch.channels_last)
    x = torch.randn(images, WIDTH, SIDE, SIDE).contiguous(memory_format=torch.channels_last)
    return block, (x, torch.randn(images, EMBEDDING))


def _transformer(images: int) -> tuple[nn.Module, tuple[Any, ...]]:
    block = BasicTransformerBlock(WIDTH, 8, WIDTH // 8, cross_attention_dim=CONTEXT)
    return block, (torch.randn(images, SIDE * SIDE, WIDTH), None, torch.randn(images, TEXT_TOKENS, CONTEXT))


def _step(block: nn.Module, inputs: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    x = inputs[0].detach().requires_grad_()
    out = block(x, *inputs[1:])
    return out.detach(), torch.autograd.grad(out.float().square().mean(), x)[0]


def _ways(block: nn.Module) -> dict[str, AbstractContextManager[None]]:
    return {
        "as it is": nullcontext(),
        "lean": lean_layers(block, products=True),
        "compiled": compiled_blocks(block, "on"),
    }


def measure(make: Callable[[int], tuple[nn.Module, tuple[Any, ...]]], images: int, rounds: int) -> str:
    """A line of the table."""
    torch.manual_seed(0)
    block, inputs = make(images)
    block.eval().requires_grad_(False).bfloat16()
    inputs = tuple(None if t is None else t.bfloat16() for t in inputs)
    steps: dict[str, float] = {}
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for name, way in _ways(block).items():
        with way:
            began = time.monotonic()
            found[name] = _step(block, inputs)
            first_s = time.monotonic() - began
            times = []
            for _ in range(rounds):
                start = time.process_time()
                _step(block, inputs)
                times.append(time.process_time() - start)
            steps[name] = 1e3 * statistics.median(times)
    true, made = found["as it is"], found["compiled"]
    errors = [float((m.float() - t.float()).norm() / t.float().norm()) for m, t in zip(made, true, strict=True)]
    numbers = [f"{steps[name]:.2f}" for name in steps] + [f"{first_s:.0f}", *(f"{e:.1e}" for e in errors)]
    return f"| {type(block).__name__} | {images} | " + " | ".join(numbers) + " |"


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    rounds = parser.parse_args().rounds
    print("| block | images | as it is, ms | lean, ms | compiled, ms | first compiled, s | output off | gradient off |")
    print("|---|---|---|---|---|---|---|---|")
    for images in (1, 4):
        for make in (_resnet, _transformer):
            print(measure(make, images, rounds), flush=True)


if __name__ == "__main__":
    main()
