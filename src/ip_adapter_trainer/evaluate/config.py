"""Settings of validation, of `ip-adapter generate` and of `ip-adapter evaluate`. Nothing heavy is imported here."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from ip_adapter_trainer.core.settings import Part, Resume, alias
from ip_adapter_trainer.diffusion.schedulers import NoiseConfig
from ip_adapter_trainer.loading.config import BaseConfig
from ip_adapter_trainer.manifest.config import HELD_OUT_SHARE, ReadConfig

Scheduler = Literal["auto", "ddim", "euler", "dpm++"]  # auto: the base model's own


class ValidationConfig(Part):
    """Settings of validation during training: losses on fixed rows, and an image grid."""

    group = "Validation"
    resume = Resume(
        must_match="validation_share",
        free="validation_steps num_validation_images validation_seed validation_data validation_root_path grid_rows "
        "grid_steps grid_guidance_scale grid_prompt",
    )

    validation_steps: int | None = Field(
        None, gt=0, description="Validate every so many optimizer steps, and at the end; None: at the end only."
    )
    num_validation_images: int = Field(
        16,
        ge=0,
        description="Rows, always the same, on which validation losses are measured: so many held-out ones and so many "
        "that are trained on; 0: no losses.",
    )
    validation_seed: int = Field(
        42, ge=0, description="Seed of validation's noise, timesteps, shuffle and grid; apart from the run's own seed."
    )
    grid_rows: int = Field(4, ge=0, description="Rows of the image grid; 0: no grid.")
    grid_steps: int = Field(30, gt=0, description="DDIM steps of each image in the grid.")
    grid_guidance_scale: float = Field(
        7.5, ge=0, description="Classifier-free guidance in the grid; at most 1: without."
    )
    grid_prompt: str | None = Field(
        "",
        description="Text prompt of every image in the grid. Empty, as the paper scores: all that appears comes from "
        "the image prompt. None: each row's own caption.",
    )
    validation_data: str = Field(
        "", description="Other rows to validate on, in any form that data_json_file takes, with the same columns."
    )
    validation_root_path: str = Field(
        "", description="Folder that image paths of validation_data start from; empty: its own folder."
    )
    validation_share: float | None = Field(
        None,
        ge=0,
        le=0.5,
        validate_default=True,
        description="Share of the images that is held out from training for validation: 8 images at least, but no more "
        "than a third of few. None: 0.01; 0 with validation_data, or where nothing is validated.",
    )

    @property
    def validates(self) -> bool:
        """True if anything is validated."""
        return bool(self.num_validation_images or self.grid_rows)

    @field_validator("validation_share")
    @classmethod
    def _own_share(cls, value: float | None, info: ValidationInfo) -> float:
        """Settle the share once, so that a resumed run has the one that it began with."""
        if value is not None:
            return value
        looked_at = any(info.data.get(name) for name in ("num_validation_images", "grid_rows"))
        return HELD_OUT_SHARE if looked_at and not info.data.get("validation_data") else 0.0

    @model_validator(mode="after")
    def _looks_at_data(self) -> ValidationConfig:
        if self.validation_data and not self.validates:
            raise ValueError(
                "validation_data is not looked at with num_validation_images 0 and grid_rows 0; raise one of them, or "
                "leave validation_data out"
            )
        return self


class DrawConfig(NoiseConfig, BaseConfig):
    """Settings of the adapter, its frozen models and the sampler."""

    adapter: str = Field(description="Adapter file (.safetensors or .bin) or checkpoint folder.")
    pretrained_model_name_or_path: str | None = Field(
        None,
        description="Base model: a diffusers pipeline folder, a hub id or a checkpoint in one .safetensors file; None: "
        "the one the adapter names.",
    )
    image_encoder_path: str | None = Field(
        None, description="Image encoder: folder or hub id; None: the one the adapter names."
    )
    prompt: str = Field("", description="Text prompt; empty: the image prompt alone decides.")
    negative_prompt: str = Field("", description="What the text guidance leads away from.")
    scale: float = Field(1.0, description="Weight of the image prompt; 0 is the base model.")
    num_inference_steps: int = Field(50, gt=0, description="Sampler steps.")
    guidance_scale: float = Field(7.5, ge=0, description="Classifier-free guidance; at most 1: without.")
    scheduler: Scheduler = Field("ddim", description="Sampler; auto: the base model's own.")
    height: int | None = Field(
        None,
        gt=0,
        multiple_of=8,
        description="Height in pixels, a multiple of 8; None: what the base model was made for.",
    )
    width: int | None = Field(None, gt=0, multiple_of=8, description="Width in pixels; see height.")
    seed: int = Field(0, ge=0, description="Seed of the first image's noise.")
    batch_size: int = Field(4, gt=0, description="Images drawn at once: more is faster and takes more memory.")
    device: str = Field("auto", description="cpu, cuda, cuda:1, mps; auto: a GPU if there is one.")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = Field(
        None, description="Precision of the frozen weights; None: fp16 on a CUDA GPU, full precision elsewhere."
    )


class GenerateConfig(DrawConfig):
    """Draw images with an image prompt."""

    image: tuple[str, ...] = Field(min_length=1, description="Image to prompt with; several are one prompt together.")
    num_images: int = Field(1, gt=0, description="Images to draw; their seeds count up from --seed.")
    output: Annotated[str, alias("-o")] = Field(
        "generated", description="PNG file, or a folder, in which nothing is overwritten."
    )


class EvaluateConfig(DrawConfig, ReadConfig):
    """Score an adapter on the rows of a manifest by the paper's protocol, beside scale 0 and shuffled prompts."""

    num_rows: int = Field(100, ge=1, description="Rows, drawn at random by --seed; the paper: 5000.")
    num_images_per_prompt: int = Field(4, gt=0, description="Images of each row; the paper: 4.")
    clip_model: str = Field(
        "openai/clip-vit-large-patch14", description="CLIPModel that scores: folder or hub id; the paper: ViT-L/14."
    )
    output: Annotated[str, alias("-o")] = Field("evaluation.json", description="JSON file of scores.")
