"""Muon (https://kellerjordan.github.io/posts/muon): momentum, its singular values all brought near one.

An update's size is brought to that of AdamW's (arXiv 2502.16982, equation 4), so that the learning rate and the weight
decay mean the same for both.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

MOMENTUM = 0.95
_QUINTIC = (3.4445, -4.7750, 2.0315)  # a x + b x^3 + c x^5 brings singular values to 0.7 to 1.2 in five rounds
_ROUNDS = 5
_ADAMW_RMS = 0.2  # the usual root mean square of AdamW's updates before the learning rate
_MAX_STACKED = 2**26  # numbers of matrices that are made orthogonal at once


def orthogonalized(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the nearest semi-orthogonal matrices [K, M, N], roughly, by Newton-Schulz rounds in a dtype."""
    x = matrices.to(dtype)
    is_tall = x.shape[1] > x.shape[2]
    x = x.mT if is_tall else x
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=1e-7)
    a, b, c = _QUINTIC
    for _ in range(_ROUNDS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


class Muon(torch.optim.Optimizer):
    """Muon for matrices [M, N], with another optimizer for all other parameters; one optimizer to its users.

    The numbering of its state begins with the matrices. Where `found_inf` is set to a scalar on the device that is one,
    as `torch.amp.GradScaler` does for fused optimizers, a step changes nothing, and the device is not waited for.

    Args:
        groups: its own parameters, `params`, with a peak learning rate `lr` each; all have gradients at every step.
        rest: the optimizer of the others, with a `found_inf` of its own if it is fused.
        weight_decay: decoupled, times the learning rate.
        dtype: of the Newton-Schulz rounds.
    """

    found_inf: Tensor | None = None

    def __init__(
        self,
        groups: list[dict[str, Any]],
        rest: torch.optim.Optimizer,
        *,
        weight_decay: float,
        dtype: torch.dtype,
    ) -> None:
        shared = {name: rest.defaults.get(name) for name in ("lr", "fused")}  # schedules and scalers ask for them
        super().__init__(groups, shared | {"weight_decay": weight_decay})
        self._own, self._rest, self.dtype = self.param_groups, rest, dtype
        self._matrices = [matrix for group in self._own for matrix in group["params"]]
        self._stacks = [(group, stack) for group in self._own for stack in _stacks(group["params"])]
        self.param_groups = [*self._own, *rest.param_groups]  # not copies: a schedule sets the rates of both

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Change all parameters by their gradients; there is no `closure`."""
        if self.found_inf is not None:
            self._rest.found_inf = self.found_inf  # type: ignore[attr-defined]
        self._rest.step()
        for group, stack in self._stacks:
            self._change(stack, group["lr"], group["weight_decay"])

    def _change(self, stack: list[Tensor], rate: Any, weight_decay: float) -> None:
        """Change matrices of one shape."""
        if self.found_inf is not None:
            rate = rate * (1 - self.found_inf)
        updates = orthogonalized(torch.stack([self._momentum(matrix) for matrix in stack]), self.dtype)
        scale = _ADAMW_RMS * max(stack[0].shape) ** 0.5
        for matrix, update in zip(stack, updates.to(stack[0].dtype), strict=True):
            matrix *= 1 - rate * weight_decay
            matrix -= rate * scale * update

    def _momentum(self, matrix: Tensor) -> Tensor:
        """Add the gradient to a matrix's momentum; return the one that looks ahead (Nesterov's), [M, N]."""
        momentum = self.state[matrix].setdefault("momentum_buffer", torch.zeros_like(matrix))
        gradient = matrix.grad
        assert gradient is not None
        if self.found_inf is None:
            momentum.lerp_(gradient, 1 - MOMENTUM)
        else:
            bad = self.found_inf.bool()
            gradient = gradient.masked_fill(bad, 0)
            momentum.copy_(torch.where(bad, momentum, momentum.lerp(gradient, 1 - MOMENTUM)))
        return gradient.lerp(momentum, MOMENTUM)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of all parameters, the matrices first."""
        mine = super().state_dict()
        rest = {len(self._matrices) + n: state for n, state in self._rest.state_dict()["state"].items()}
        return mine | {"state": mine["state"] | rest}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the states that `state_dict` returned; rates are those of a schedule and stay."""
        count, states = len(self._matrices), state_dict["state"]
        rest = {n - count: state for n, state in states.items() if n >= count}
        self._rest.load_state_dict(self._rest.state_dict() | {"state": rest})
        self.param_groups = [*self._own, *self._rest.param_groups]
        for n, matrix in enumerate(self._matrices):
            if n in states:
                self.state[matrix] = {"momentum_buffer": states[n]["momentum_buffer"].to(matrix, copy=True)}


def _stacks(matrices: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Yield matrices of one shape together, as many as fit into `_MAX_STACKED`."""
    for _, alike in groupby(sorted(matrices, key=lambda matrix: tuple(matrix.shape)), key=lambda matrix: matrix.shape):
        left = list(alike)
        most = max(1, _MAX_STACKED // left[0].numel())
        yield from (left[start : start + most] for start in range(0, len(left), most))
