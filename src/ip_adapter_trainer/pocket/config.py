"""Settings of `ip-adapter pocket`."""

from __future__ import annotations

from typing import Annotated

import tyro
from pydantic import Field

from ip_adapter_trainer.core.settings import Part


class PocketConfig(Part):
    """Lay out the embedded base model, its image encoder and a training set."""

    folder: Annotated[str, tyro.conf.Positional] = Field(description="Folder to fill.")
    rows: int = Field(2000, ge=1, description="Rows of the training set; each has a target and a prompt picture.")
    seed: int = Field(0, description="Seed of the training set.")
