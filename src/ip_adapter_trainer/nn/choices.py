"""Names of the ways in which a frozen net is kept and run; light, as settings are parsed before torch is imported."""

from __future__ import annotations

from typing import Literal

Storage = Literal["none", "int8", "nf4"]  # how weights are kept, see `nn.packed`
Compile = Literal["off", "on", "reduce-overhead"]  # see `nn.compiled`
