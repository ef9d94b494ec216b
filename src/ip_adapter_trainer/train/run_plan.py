"""The plan of a run in numbers: printed at every start, and all that `--dry_run` does."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ip_adapter_trainer.model import Model
from ip_adapter_trainer.nn.packed import packed_weights
from ip_adapter_trainer.train import optim
from ip_adapter_trainer.train.config import OptimConfig
from ip_adapter_trainer.train.restored import length_settings


def parameters(*modules: nn.Module) -> int:
    """Count the parameters of some modules, packed weights among them."""
    return sum(packed_weights(m) + sum(p.numel() for p in m.parameters()) for m in modules)


@dataclass(frozen=True)
class RunPlan:
    """The derived numbers of a run."""

    trained: dict[str, int]  # parameters by part
    frozen: dict[str, int]
    rows: int
    images_per_step: int
    total_steps: int
    warmup_steps: int
    weights_bytes: int
    checkpoint_bytes: int

    @property
    def epochs(self) -> float:
        """Passes over the rows."""
        return self.total_steps * self.images_per_step / self.rows

    def lines(self) -> list[str]:
        """Return the plan as aligned lines."""
        total = sum(self.trained.values())
        run = {
            "rows": f"{self.rows:,}",
            "images per step": f"{self.images_per_step:,}",
            "steps": f"{self.total_steps:,}",
            "epochs": f"{self.epochs:,.2f}",
            "weights on disk": f"{self.weights_bytes / 1e6:,.1f} MB",
            "checkpoint on disk": f"{self.checkpoint_bytes / 1e6:,.1f} MB",
        }
        out = ["trained parameters"]
        out += [f"  {name:<24}{count:>15,}" for name, count in [*self.trained.items(), ("total", total)]]
        out += ["frozen parameters"] + [f"  {name:<24}{count:>15,}" for name, count in self.frozen.items()]
        return out + ["run"] + [f"  {name:<24}{value:>15}" for name, value in run.items()]


def total_steps(config: OptimConfig, rows: int, images_per_step: int) -> int:
    """Return the optimizer steps of a run."""
    return config.max_train_steps or math.ceil(config.num_train_epochs * rows / images_per_step)


def _warmup_steps(config: OptimConfig, steps: int, rows: int, resumed: Mapping[str, Any] | None) -> int:
    """Return the steps of linear warm-up: those asked for, else those that a resumed run began with."""
    if resumed is None or config.lr_warmup_steps is not None:
        return optim.warmup_steps(config, steps)
    if (known := resumed.get("warmup_steps")) is not None:
        return int(known)
    begun, sums = length_settings(resumed), resumed.get("row_sums")
    steps = total_steps(begun, sums["rows"] if sums else rows, resumed["images_per_step"])
    return optim.warmup_steps(begun, steps)


def make_plan(
    model: Model, config: OptimConfig, rows: int, images_per_step: int, resumed: Mapping[str, Any] | None = None
) -> RunPlan:
    """Derive a run's numbers from its model, its settings and, if it was resumed, the checkpoint's state."""
    layers = [model.adapter.adapter_modules[str(layer.number)] for layer in model.adapted]
    trained = {
        "projector": parameters(model.adapter.image_proj_model),
        f"{len(layers)} attention layers": parameters(*layers),
    }
    frozen = {f"{role} encoder": parameters(encoder.model) for role, encoder in model.encoders.items()}
    frozen |= {n: parameters(m) for n, m in model.denoiser.pipeline.components.items() if isinstance(m, nn.Module)}
    weights_bytes = 4 * parameters(model.adapter)  # layers that carry no adapter are written as zeros
    single = sum(p.numel() for p in optim.by_muon(model.adapter, config))  # with one moment each, always in fp32
    moments_bytes = 4 * (single + 2 * (sum(trained.values()) - single) * (1 / 4 if config.use_8bit_adam else 1))
    copies = 3 if config.use_ema else 1  # published, and with an average also the average and the live weights
    steps = total_steps(config, rows, images_per_step)
    warmup = _warmup_steps(config, steps, rows, resumed)
    checkpoint_bytes = int(copies * weights_bytes + moments_bytes)
    return RunPlan(trained, frozen, rows, images_per_step, steps, warmup, weights_bytes, checkpoint_bytes)
