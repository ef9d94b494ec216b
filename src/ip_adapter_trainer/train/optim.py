"""Optimizer, schedule, average, and gradients that live in one flat buffer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ip_adapter_trainer.core.errors import Problem
from ip_adapter_trainer.model import Adapter
from ip_adapter_trainer.runtime.precision import computes_bf16
from ip_adapter_trainer.train.config import OptimConfig
from ip_adapter_trainer.train.muon import Muon

MAX_WARMUP_STEPS = 500  # unless more are asked for
LARGEST_WEIGHT = torch.finfo(torch.float16).max  # adapters are published in fp16
LARGEST_MOMENT = torch.finfo(torch.float32).max
_NORM_ROW = 4096  # gradients whose squares are added up one after another


class Gradients:
    """Holds all gradients as views of one buffer, with room for a loss at its end.

    One collective a step averages everything over the processes: gradients and the loss to report. The norm is that of
    the norms of short rows: 1e8 squares added up in one float32 sum come out a per cent too small on a CPU.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        params = list(parameters)
        size = sum(p.numel() for p in params)
        whole_rows = -(-size // _NORM_ROW) * _NORM_ROW  # what is beyond the gradients stays zero
        self._buffer = torch.zeros(whole_rows + 1, dtype=torch.float32, device=params[0].device)
        self.flat = self._buffer[:size]  # [P]
        for p, gradient in zip(params, self.flat.split([p.numel() for p in params]), strict=True):
            p.grad = gradient.view_as(p)

    def zero(self) -> None:
        """Clear gradients and loss before a step."""
        self._buffer.zero_()

    def add_loss(self, loss: Tensor) -> None:
        """Add a micro batch's share of the loss to report, a scalar."""
        self._buffer[-1] += loss

    def average(self, world: int) -> None:
        """Take means over all processes; afterwards every one holds the same buffer."""
        if world > 1:
            torch.distributed.all_reduce(self._buffer)
            self._buffer /= world

    def clip(self, max_norm: float | None) -> Tensor:
        """Scale gradients down to a norm; return the norm before, a scalar on the device."""
        rows = torch.linalg.vector_norm(self._buffer[:-1].view(-1, _NORM_ROW), dim=1)
        norm = rows.square().sum().sqrt()
        if max_norm is not None:
            self.flat *= (max_norm / (norm + 1e-6)).clamp(max=1.0)
        return norm

    def report(self, norm: Tensor) -> Tensor:
        """Return the step's numbers [3] on the device: loss, norm, one if either is not finite."""
        loss = self._buffer[-1]
        return torch.stack((loss, norm, (~(loss.isfinite() & norm.isfinite())).float()))


def step_if_finite(optimizer: torch.optim.Optimizer, bad: Tensor) -> None:
    """Step, unless `bad`, a scalar on the device, is one: then weights and moments stay what they are.

    A fused optimizer of PyTorch's looks at it on the device; for others the host must.
    """
    if optimizer.defaults.get("fused"):
        optimizer.found_inf = bad  # type: ignore[attr-defined]  # as `torch.amp.GradScaler` tells such an optimizer
        optimizer.step()
    elif not bool(bad):
        optimizer.step()


@torch.no_grad()
def all_within(limit: float, tensors: Iterable[Tensor]) -> bool:
    """Tell whether every number of tensors [...] is within a limit, so none is NaN; wait for the device."""
    return all(bool((tensor.abs() <= limit).all()) for tensor in tensors if tensor.is_floating_point())


def make_optimizer(adapter: Adapter, config: OptimConfig) -> torch.optim.Optimizer:
    """Make the optimizer of an adapter: AdamW in groups of one rate each, or Muon with AdamW beside it.

    Its state is numbered as its groups are: the projector's matrices where Muon changes them, then all others in order.

    Raises:
        Problem: 8-bit asked for and bitsandbytes not installed.
    """
    projector, layers = _trained(adapter)
    matrices = set(by_muon(adapter, config))

    def groups(*, of_muon: bool) -> list[dict[str, Any]]:
        """Return the parameters that Muon changes, or the others, each part with its rate."""
        rates = config.projector_rate, config.learning_rate
        chosen = [[p for p in part if (p in matrices) == of_muon] for part in (projector, layers)]
        return [{"params": part, "lr": rate} for part, rate in zip(chosen, rates, strict=True) if part]

    rest = _adamw(groups(of_muon=False), config)
    if not matrices:
        return rest
    dtype = torch.bfloat16 if computes_bf16(next(iter(matrices)).device.type) else torch.float32
    return Muon(groups(of_muon=True), rest, weight_decay=config.weight_decay, dtype=dtype)


def _trained(adapter: Adapter) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return the trained parameters of the projector, and of the layers."""
    parts = (adapter.image_proj_model, adapter.adapter_modules)
    projector, layers = ([p for p in part.parameters() if p.requires_grad] for part in parts)
    return projector, layers


def by_muon(adapter: Adapter, config: OptimConfig) -> list[nn.Parameter]:
    """Return the matrices that Muon changes; it keeps one moment of each, where AdamW keeps two."""
    projector, layers = _trained(adapter)
    chosen = {"adamw": [], "muon": projector, None: projector, "muon_all": [*projector, *layers]}[config.optimizer]
    return [p for p in chosen if p.ndim == 2]


def _adamw(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    """Return PyTorch's AdamW, fused or not, or bitsandbytes' 8-bit one."""
    options: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
        "weight_decay": config.weight_decay,
    }
    if not config.use_8bit_adam:
        fused = True if config.fused_optimizer else None  # False would rule out PyTorch's default on a GPU as well
        return torch.optim.AdamW(groups, fused=fused, **options)
    try:
        import bitsandbytes
    except ImportError as error:
        remedy = "pip install 'ip_adapter_trainer[bnb]', or leave --use_8bit_adam out"
        raise Problem("the 8-bit optimizer needs bitsandbytes", where="--use_8bit_adam", remedy=remedy) from error
    optimizer: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(groups, **options)
    return optimizer


def warmup_steps(config: OptimConfig, total_steps: int) -> int:
    """Return the steps of linear warm-up: those asked for, else a tenth of the run, 500 at most."""
    if config.lr_warmup_steps is not None:
        return config.lr_warmup_steps
    return min(total_steps // 10, MAX_WARMUP_STEPS)


def make_schedule(
    optimizer: torch.optim.Optimizer,
    config: OptimConfig,
    total_steps: int,
    warmup: int | None = None,
    global_step: int = 0,
) -> Any:
    """Make diffusers' learning-rate schedule over the optimizer steps of a whole run, from `global_step` on.

    Beyond step 0 the optimizer must have had a schedule before; without `warmup` it is as `warmup_steps` says.

    Raises:
        Problem: warm-up asked of a schedule that has none.
    """
    from diffusers.optimization import get_scheduler

    if config.lr_warmup_steps and config.lr_scheduler == "constant":
        remedy = "take --lr_scheduler constant_with_warmup"
        raise Problem("the constant schedule has no warm-up", where="--lr_warmup_steps", remedy=remedy)
    return get_scheduler(
        config.lr_scheduler,
        optimizer,
        num_warmup_steps=warmup_steps(config, total_steps) if warmup is None else warmup,
        num_training_steps=total_steps,
        num_cycles=config.lr_num_cycles,
        power=config.lr_power,
        last_epoch=global_step - 1,
    )


def make_ema(adapter: nn.Module, config: OptimConfig) -> Any:
    """Make diffusers' EMAModel over the adapter, or None."""
    from diffusers.training_utils import EMAModel

    return EMAModel(adapter.parameters(), decay=config.ema_decay) if config.use_ema else None


@contextmanager
def averaged(adapter: nn.Module, ema: Any) -> Iterator[dict[str, Tensor]]:
    """Put averaged weights, where there are any, into the adapter for a while; give its state dict of [...]."""
    if ema is None:
        yield adapter.state_dict()
        return
    ema.store(adapter.parameters())
    ema.copy_to(adapter.parameters())
    try:
        yield adapter.state_dict()
    finally:
        ema.restore(adapter.parameters())
