"""Settings by which rows become batches."""

from __future__ import annotations

from pydantic import Field, model_validator

from ip_adapter_trainer.cache.config import CutConfig
from ip_adapter_trainer.core.settings import Resume

_IMAGES = 8  # of the published recipe, per process


class DataConfig(CutConfig):
    """Order and drop rates by which rows become batches of training images."""

    resume = Resume(
        must_match="text_drop_rate image_drop_rate both_drop_rate",
        may_change="train_batch_size",
        free="prefetch_factor",
    )

    train_batch_size: int | None = Field(
        None,
        gt=0,
        le=65536,
        description="Images per process and micro-batch; None: 8 a step, as many at a time as memory holds.",
    )
    text_drop_rate: float = Field(0.05, ge=0, le=1, description="Share of images trained without their text.")
    image_drop_rate: float = Field(0.05, ge=0, le=1, description="Share of images trained without image prompt.")
    both_drop_rate: float = Field(0.05, ge=0, le=1, description="Share of images trained without either.")
    prefetch_factor: int = Field(2, gt=0, le=1024, description="Micro-batches that each data worker prepares ahead.")

    @property
    def micro_images(self) -> int:
        """The images per process and micro-batch, where memory does not ask for fewer."""
        return self.train_batch_size or _IMAGES

    @model_validator(mode="after")
    def _rates(self) -> DataConfig:
        total = self.text_drop_rate + self.image_drop_rate + self.both_drop_rate
        if total > 1 + 1e-9:
            names = "text_drop_rate, image_drop_rate and both_drop_rate"
            raise ValueError(f"{names} exclude each other and sum to {total:g}; lower them to 1 or less together")
        return self
