"""Layers that compute in another way for a while."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


@contextmanager
def classes_changed(changes: Iterable[tuple[nn.Module, type[nn.Module]]]) -> Iterator[None]:
    """Gives layers other classes for a while; parameters and their names stay where they are.

    Args:
        changes: each layer with the class it gets, which must make do with what the layer holds.
    """
    changed = [(layer, type(layer), kind) for layer, kind in changes]
    for layer, _, kind in changed:
        layer.__class__ = kind
    try:
        yield
    finally:
        for layer, own, _ in changed:
            layer.__class__ = own
