"""Processor time of a step under each way to save memory, by turns, on one core of a CPU.

    OMP_NUM_THREADS=1 taskset -c 0 python -m benchmarks.memory_cost [--rounds 3]

SD1.5 at half its width, 256 px, one image, bf16, random weights, rows encoded beforehand. Processor time, not time on
the clock: other programs on the machine then hardly count.
"""

from __future__ import annotations

import argparse
import statistics
import time
from contextlib import ExitStack

import torch

from benchmarks.memory_budget import STORAGES, step
from benchmarks.sizes import SIZES, build, model_of
from ip_adapter_trainer.families import FAMILIES
from ip_adapter_trainer.model import Model
from ip_adapter_trainer.nn.packed import Storage, pack
from ip_adapter_trainer.train.config import LeanConfig
from ip_adapter_trainer.train.lean import lean

SIZE, SIDE_PX = "half", 256


def random_model(storage: Storage) -> Model:
    """The model of `SIZE` in bf16, its denoiser's weights kept in some way."""
    size = SIZES[SIZE]
    nets = build(size, "cpu")
    nets.pipeline.to(dtype=torch.bfloat16)
    nets.image_encoder.to(torch.bfloat16)
    pack(nets.pipeline.unet, storage, "cpu", FAMILIES[size.family].spared)
    return model_of(size, nets)


def _recompute(model: Model, on: bool) -> None:
    if on:
        model.checkpoint_activations()
    else:
        model.denoiser.net.disable_gradient_checkpointing()


def measure(rounds: int) -> dict[tuple[Storage, bool], list[float]]:
    """Seconds of each step, by storage and whether activations are recomputed; the first round is not counted."""
    models = {storage: random_model(storage) for storage in STORAGES}
    found: dict[tuple[Storage, bool], list[float]] = {}
    with ExitStack() as stack:
        for model in models.values():
            stack.enter_context(model.attached())
            stack.enter_context(lean(model, LeanConfig()))
        for i in range(rounds + 1):
            for storage, model in models.items():
                for on in (False, True):
                    _recompute(model, on)
                    began = time.process_time()
                    step(model, SIZES[SIZE], SIDE_PX, 1)
                    found.setdefault((storage, on), []).extend([time.process_time() - began] if i else [])
    return found


def main() -> None:
    """Prints a table: the median step, and how many times the plain one that is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    found = {way: statistics.median(times) for way, times in measure(parser.parse_args().rounds).items()}
    print("| frozen weights | activations | step, s | times the first |\n|---|---|---|---|")
    for (storage, on), seconds in found.items():
        names = "bf16" if storage == "none" else storage, "recomputed" if on else "kept"
        print(f"| {names[0]} | {names[1]} | {seconds:.3f} | {seconds / found['none', False]:.2f} |")


if __name__ == "__main__":
    main()
