"""Settings by which rows become targets and image prompts."""

from __future__ import annotations

from pydantic import Field, field_validator, model_validator

from ip_adapter_trainer.core.settings import Resume
from ip_adapter_trainer.images.buckets import LATENT_STEP_PX, Buckets
from ip_adapter_trainer.manifest.config import ReadConfig


class BucketConfig(ReadConfig):
    """Sizes to which training images are cut."""

    resume = Resume(must_match="resolution aspect_ratio_buckets bucket_step_px bucket_max_aspect")

    resolution: int = Field(512, gt=0, le=16384, description="Side of the training images in pixels; a multiple of 8.")
    aspect_ratio_buckets: bool = Field(
        False, description="Cut each image to the nearest of several aspect ratios instead of a square."
    )
    bucket_step_px: int = Field(64, gt=0, description="Sides of the buckets are multiples of this; itself one of 8.")
    bucket_max_aspect: float = Field(2.0, ge=1, description="Largest aspect ratio of a bucket, long side over short.")

    @field_validator("resolution", "bucket_step_px")
    @classmethod
    def _whole_latents(cls, value: int) -> int:
        if value % LATENT_STEP_PX:
            below = value // LATENT_STEP_PX * LATENT_STEP_PX
            near = f"{below} or {below + LATENT_STEP_PX}" if below else str(LATENT_STEP_PX)
            raise ValueError(f"{value} is no multiple of {LATENT_STEP_PX}, the pixels of one latent; take {near}")
        return value

    @model_validator(mode="after")
    def _makes_buckets(self) -> BucketConfig:
        self.buckets()
        return self

    def buckets(self) -> Buckets:
        """Return the sizes to which training images are cut."""
        if not self.aspect_ratio_buckets:
            return Buckets.square(self.resolution)
        return Buckets.ladder(self.resolution, step_px=self.bucket_step_px, max_aspect=self.bucket_max_aspect)


class CutConfig(BucketConfig):
    """Cuts by which rows become targets and image prompts."""

    resume = Resume(must_match="center_crop random_flip prompt_crop_min_share prompt_flip prompt_pad_square")

    center_crop: bool = Field(True, description="Crop at the centre; off: at a random place.")
    random_flip: bool = Field(False, description="Mirror half of the images, target and prompt alike.")
    prompt_crop_min_share: float = Field(
        1.0, gt=0, le=1, description="Prompt with a random part of at least this share of the area; 1: with all of it."
    )
    prompt_flip: bool = Field(False, description="Mirror half of the image prompts, whatever happens to the target.")
    prompt_pad_square: bool = Field(
        False, description="Pad image prompts to a square with the alpha background, so that the encoder crops nothing."
    )
