"""Layers that compute in another way for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def forwards_replaced(replacements: Iterable[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Give layers, each once, another `forward` for a while; their hooks, parameters and names stay what they are."""
    replaced = list(replacements)
    for layer, forward in replaced:
        layer.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer, _ in replaced:
            del layer.forward
