"""Borrowing a model from whoever owns it, a training loop above all, and giving it back as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

from ip_adapter_trainer.model import Model


@contextmanager
def evaluation_mode(model: Model) -> Iterator[None]:
    """Attach the adapter in evaluation mode, without gradients; leave all as it was found, whatever is raised."""
    was_training, seen = model.adapter.training, dict(vars(model.prompt))
    model.adapter.eval()
    try:
        # Not inference_mode: the encoder keeps its null feature, and training needs that one afterwards.
        with nullcontext() if model.is_attached else model.attached(), torch.no_grad():
            yield
    finally:
        model.adapter.train(was_training)
        vars(model.prompt).update(seen)
