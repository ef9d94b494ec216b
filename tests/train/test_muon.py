"""Muon for the projector's matrices, as one optimizer with AdamW for all else."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from ip_adapter_trainer.model import Adapter
from ip_adapter_trainer.train.config import OptimConfig
from ip_adapter_trainer.train.muon import Muon, orthogonalized
from ip_adapter_trainer.train.optim import make_optimizer, step_if_finite

RATES = {"learning_rate": 1e-2, "projector_learning_rate": 3e-2, "weight_decay": 0.1}
needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")


def parts() -> tuple[nn.Module, nn.Module]:
    """A projector with matrices of two shapes, one of them twice, and 3-D latents; and a layer."""
    torch.manual_seed(0)
    projector = nn.Sequential(nn.Linear(12, 20), nn.LayerNorm(20), nn.Linear(20, 12), nn.Linear(12, 20, bias=False))
    projector.latents = nn.Parameter(torch.randn(1, 3, 12))
    return projector, nn.Linear(6, 4, bias=False)


def gradients(seed: int, *modules: nn.Module) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for parameter in (p for module in modules for p in module.parameters()):
        parameter.grad = torch.randn(parameter.shape, generator=generator)
        yield parameter.grad


def made(projector: nn.Module, layer: nn.Module, **settings: object) -> torch.optim.Optimizer:
    config = OptimConfig(**({"optimizer": "muon"} | RATES | settings))  # type: ignore[arg-type]
    return make_optimizer(Adapter(projector, {1: layer}), config)


def step(optimizer: torch.optim.Optimizer, seed: int, *modules: nn.Module) -> None:
    list(gradients(seed, *modules))
    optimizer.step()


def values(*modules: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for module in modules for p in module.parameters()]


@needs_muon
def test_it_makes_the_steps_of_torchs_muon_and_of_torchs_adamw() -> None:
    ours, theirs = parts(), parts()
    optimizer = made(*ours)
    assert isinstance(optimizer, Muon)
    optimizer.dtype = torch.bfloat16  # torch's has no other
    matrices = [p for p in theirs[0].parameters() if p.ndim == 2]
    others = [p for p in theirs[0].parameters() if p.ndim != 2]
    muon = torch.optim.Muon(matrices, lr=3e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    groups = [{"params": others, "lr": 3e-2}, {"params": list(theirs[1].parameters()), "lr": 1e-2}]
    adamw = torch.optim.AdamW(groups, weight_decay=0.1)
    for seed in range(5):
        step(optimizer, seed, *ours)
        step(muon, seed, *theirs)
        adamw.step()
    for mine, golden in zip(values(*ours), values(*theirs), strict=True):
        torch.testing.assert_close(mine, golden, rtol=0, atol=2e-4 if mine.ndim == 2 else 1e-6)


@pytest.mark.parametrize("shape", [(30, 8), (8, 30), (16, 16)])
def test_singular_values_come_near_one(shape: tuple[int, int]) -> None:
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1))
    matrices *= torch.tensor([1e-6, 1, 1e4])[:, None, None]
    found = torch.linalg.svdvals(orthogonalized(matrices, torch.float32))
    assert found.min() > 0.3 and found.max() < 1.3
    assert torch.isfinite(orthogonalized(torch.zeros(1, *shape), torch.float32)).all()


def test_a_schedule_sets_the_rates_of_all_parts_in_proportion() -> None:
    projector, layer = parts()
    optimizer = made(projector, layer)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: 0.5**done)
    before = values(projector, layer)
    for seed in range(200):
        step(optimizer, seed, projector, layer)
        schedule.step()
    assert schedule.get_last_lr() == [pytest.approx(rate * 0.5**200) for rate in (3e-2, 3e-2, 1e-2)]
    for old, new in zip(before, values(projector, layer), strict=True):
        assert 0 < (new - old).abs().mean() < 0.2


@pytest.mark.parametrize("name", ["adamw", "muon", "muon_all"])
def test_a_state_taken_up_goes_on_with_the_same_bytes(name: str) -> None:
    first, second = parts(), parts()
    optimizer = made(*first, optimizer=name)
    for seed in range(3):
        step(optimizer, seed, *first)
    saved = copy.deepcopy(optimizer.state_dict()["state"])
    for module, other in zip(second, first, strict=True):
        module.load_state_dict(other.state_dict())
    resumed = made(*second, optimizer=name)
    resumed.load_state_dict(resumed.state_dict() | {"state": saved})
    schedule = torch.optim.lr_scheduler.LambdaLR(resumed, lambda done: 1.0)
    for seed in range(3, 6):
        step(optimizer, seed, *first)
        step(resumed, seed, *second)
        schedule.step()
    assert all(torch.equal(a, b) for a, b in zip(values(*first), values(*second), strict=True))


@pytest.mark.parametrize("fused", [True, False])
def test_a_step_that_is_not_finite_changes_nothing(fused: bool) -> None:
    ours, never = parts(), parts()
    optimizer, other = made(*ours, fused_optimizer=fused), made(*never, fused_optimizer=fused)
    for seed in range(4):
        for gradient in gradients(seed, *ours):
            if seed == 2:
                gradient[0] = float("nan")
        step_if_finite(optimizer, torch.tensor(float(seed == 2)))
        if seed != 2:
            step(other, seed, *never)
    assert all(torch.equal(a, b) for a, b in zip(values(*ours), values(*never), strict=True))


def test_only_matrices_of_the_projector_are_muons() -> None:
    optimizer = made(*parts())
    assert isinstance(optimizer, Muon)
    assert [tuple(p.shape) for p in optimizer.param_groups[0]["params"]] == [(20, 12), (12, 20), (20, 12)]
    assert [len(group["params"]) for group in optimizer.param_groups] == [3, 5, 1]
