"""Settings of `ip-adapter pocket` and of `ip-adapter demo`."""

from __future__ import annotations

from typing import Annotated

import tyro
from pydantic import Field

from ip_adapter_trainer.core.settings import Part


class PocketConfig(Part):
    """Write the embedded base model, its image encoder and a training set."""

    folder: Annotated[str, tyro.conf.Positional] = Field(description="Folder to fill.")
    rows: int = Field(2000, ge=1, description="Rows of the training set; each has a target and a prompt image.")
    seed: int = Field(0, description="Seed of the training set.")


class DemoConfig(Part):
    """Train, export, generate and score on the embedded base model."""

    output_dir: str = Field("demo", description="Folder for everything the demo writes.")
    rows: int = Field(2000, ge=64, description="Training rows written to disk.")
    max_train_steps: int = Field(300, ge=1, description="Optimizer steps.")
    train_batch_size: int = Field(32, ge=1, description="Images per step.")
    learning_rate: float = Field(1e-3, gt=0, description="Learning rate; a small adapter takes a large one.")
    min_timestep: int = Field(400, ge=0, description="First timestep that is trained: stronger noise decides colours.")
    pairs: int = Field(100, ge=8, description="Held-out pairs that are scored.")
    steps: int = Field(25, ge=1, description="Sampler steps.")
    guidance_scale: float = Field(4.0, ge=0, description="Classifier-free guidance.")
    seed: int = Field(0, description="Seed of rows, training and pairs.")
