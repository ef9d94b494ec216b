"""Borrowing a model from whoever owns it, a training loop above all, and giving it back as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

from ip_adapter_trainer.model import Model


@contextmanager
def evaluation_mode(model: Model) -> Iterator[None]:
    """Attach the adapter in evaluation mode, without gradients; all is as it was found after, whatever is raised."""
    was_training, tokens, scale = model.adapter.training, model.prompt.tokens, model.prompt.scale
    model.adapter.eval()
    try:
        # Not inference_mode: the encoder keeps its null feature, and training needs that one afterwards.
        with nullcontext() if model.is_attached else model.attached(), torch.no_grad():
            yield
    finally:
        model.adapter.train(was_training)
        model.prompt.tokens, model.prompt.scale = tokens, scale
