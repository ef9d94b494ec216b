"""Nested optimizer state as flat tensors and JSON, so that no checkpoint of ours needs a pickle to be resumed."""

from __future__ import annotations

from typing import Any

from torch import Tensor

Flat = dict[str, Tensor]
_TENSOR = "__tensor__"


def flatten(tree: Any, prefix: str) -> tuple[Flat, Any]:
    """Split nested dicts, lists and tuples into tensors by path and a JSON-ready skeleton that refers to them.

    >>> flatten({"lr": 0.1, "state": {0: [1, 2]}}, "optimizer")[1]
    {'lr': 0.1, 'state': {'__int_keys__': {'0': [1, 2]}}}
    """
    tensors: Flat = {}

    def walk(node: Any, path: str) -> Any:
        """Return the skeleton of a node; put its tensors into `tensors` under their paths."""
        if isinstance(node, Tensor):
            tensors[path] = node.detach().cpu().contiguous().clone()
            return {_TENSOR: path}
        if isinstance(node, dict):
            walked = {str(key): walk(value, f"{path}.{key}") for key, value in node.items()}
            return {"__int_keys__": walked} if node and all(isinstance(key, int) for key in node) else walked
        if isinstance(node, (list, tuple)):
            return [walk(value, f"{path}.{place}") for place, value in enumerate(node)]
        return node

    return tensors, walk(tree, prefix)


def unflatten(tensors: Flat, skeleton: Any) -> Any:
    """Join what `flatten` split; tuples come back as lists."""
    if isinstance(skeleton, dict):
        if _TENSOR in skeleton:
            return tensors[skeleton[_TENSOR]]
        if "__int_keys__" in skeleton:
            return {int(key): unflatten(tensors, value) for key, value in skeleton["__int_keys__"].items()}
        return {key: unflatten(tensors, value) for key, value in skeleton.items()}
    if isinstance(skeleton, list):
        return [unflatten(tensors, value) for value in skeleton]
    return skeleton
