"""A frozen net's repeated blocks compiled where they are, one by one: regional compilation.

Transformer blocks, residual blocks and the layers that resize are nearly all of a UNet. Each is compiled by itself, so
blocks of equal shapes share their code, and the net between them stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ip_adapter_trainer.nn.choices import Compile

_BLOCKS = ("BasicTransformerBlock", "ResnetBlock2D", "Upsample2D", "Downsample2D")
_VERSIONS = 64  # of one kind of block: every width and, with buckets, sizes; Dynamo's own limit is 8


@contextmanager
def compiled_blocks(net: nn.Module, how: Compile, backend: str = "inductor") -> Iterator[None]:
    """Compiles a net's blocks for a while, for steps with gradients; without them the blocks run as they are.

    Parameters and their names stay where they are. A second size of picture compiles once more, with sizes left open.

    Args:
        net: frozen, its layers not lean.
        how: "reduce-overhead" replays CUDA graphs.
        backend: of torch.compile.
    """
    mode = "reduce-overhead" if how == "reduce-overhead" else None
    with ExitStack() as stack:
        stack.enter_context(torch._dynamo.config.patch(recompile_limit=_VERSIONS))
        for block in net.modules():
            if type(block).__name__ in _BLOCKS:
                block.forward = _with_gradients(block.forward, mode, backend)  # type: ignore[method-assign]
                stack.callback(delattr, block, "forward")
        yield


def _with_gradients(forward: Callable[..., Any], mode: str | None, backend: str) -> Callable[..., Any]:
    """A block's forward, compiled for where gradients are wanted: a drawing changes sizes and scales too often."""
    run = torch.compile(forward, fullgraph=True, mode=mode, backend=backend)

    def either(*args: Any, **kwargs: Any) -> Any:
        """Dispatches."""
        return (run if torch.is_grad_enabled() else forward)(*args, **kwargs)

    return either
