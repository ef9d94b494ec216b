"""Settings of validation. No torch here: the command line builds its help from these classes."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ip_adapter_trainer.core.settings import Part

Scheduler = Literal["auto", "ddim", "euler", "dpm++"]  # auto: the base model's own


class ValidationConfig(Part):
    """What a run looks at while it trains: losses on fixed rows, and a picture grid."""

    validation_steps: int | None = Field(
        None, gt=0, description="Validate every so many optimizer steps, and at the end; None: at the end only."
    )
    num_validation_images: int = Field(
        16, ge=0, description="Rows, always the same, on which validation losses are measured; 0: no losses."
    )
    validation_seed: int = Field(
        42, ge=0, description="Seed of validation's noise, timesteps, shuffle and grid; apart from the run's own seed."
    )
    grid_rows: int = Field(4, ge=0, description="Rows of the picture grid; 0: no grid.")
    grid_steps: int = Field(30, gt=0, description="DDIM steps of each picture in the grid.")
    grid_guidance_scale: float = Field(
        7.5, ge=0, description="Classifier-free guidance in the grid; at most 1: without."
    )
    grid_prompt: str | None = Field(
        "",
        description="Text prompt of every picture in the grid. Empty, as the paper scores: all that appears comes from "
        "the image prompt. None: each row's own caption.",
    )
