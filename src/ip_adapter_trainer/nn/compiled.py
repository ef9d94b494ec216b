"""A frozen net's repeated blocks compiled where they are, one by one: regional compilation.

Transformer blocks, residual blocks and the layers that resize are nearly all of a UNet. Each is compiled by itself, so
blocks of equal shapes share their code, and the net between them stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ip_adapter_trainer.nn.choices import Compile
from ip_adapter_trainer.nn.forwards import forwards_replaced

_BLOCKS = ("BasicTransformerBlock", "ResnetBlock2D", "Upsample2D", "Downsample2D")
_VERSIONS = 64  # of one kind of block: every width and, with buckets, sizes; Dynamo's own limit is 8


@contextmanager
def compiled_blocks(net: nn.Module, how: Compile, backend: str = "inductor") -> Iterator[None]:
    """Compile a net's blocks for a while, for steps with gradients; without them the blocks run as they are.

    Parameters and their names stay where they are. A second size of image compiles once more, with sizes left open.
    "reduce-overhead" replays CUDA graphs.
    """
    mode = "reduce-overhead" if how == "reduce-overhead" else None
    blocks = [block for block in net.modules() if type(block).__name__ in _BLOCKS]
    compiled = [(block, _with_gradients(block.forward, mode, backend)) for block in blocks]
    # The public name of this setting, in torch.compiler.config, is there from torch 2.10 on only.
    with torch._dynamo.config.patch(recompile_limit=_VERSIONS), forwards_replaced(compiled):
        yield


def _with_gradients(forward: Callable[..., Any], mode: str | None, backend: str) -> Callable[..., Any]:
    """Compile a block's forward for where gradients are wanted: a drawing changes sizes and scales too often."""
    run = torch.compile(forward, fullgraph=True, mode=mode, backend=backend)
    return lambda *args, **kwargs: (run if torch.is_grad_enabled() else forward)(*args, **kwargs)
