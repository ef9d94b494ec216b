"""Settings of the data: what is read, how it becomes training images, how it is checked."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from ip_adapter_trainer.core.settings import Part, Resume, alias
from ip_adapter_trainer.images.buckets import LATENT_STEP_PX, Buckets
from ip_adapter_trainer.images.ground import parse_colour
from ip_adapter_trainer.images.limits import MOST_MEGAPIXELS

HELD_OUT_SHARE = 0.01  # of the images, unless a run says otherwise


class ReadConfig(Part):
    """Where rows and pictures are, and which of them are refused."""

    resume = Resume(
        must_match="allow_outside_root alpha_ground min_side_px max_aspect max_picture_megapixels max_picture_mb "
        "max_pixels_per_byte",
        may_change="data_json_file data_root_path image_column text_column prompt_image_column picture_hashes_file "
        "caption_extension missing_captions",
        free="max_fault_rate dataloader_num_workers",
    )

    data_json_file: str = Field(
        description="Manifest: a .json, .jsonl, .csv or .tsv file, or a folder of pictures with captions."
    )
    data_root_path: str = Field("", description="Folder that image paths start from; empty: the manifest's own folder.")
    image_column: str = Field("image_file", min_length=1, description="Key of the picture's path in the manifest.")
    text_column: Annotated[str, alias("caption_column")] = Field(
        "text", min_length=1, description="Key of the caption in the manifest."
    )
    prompt_image_column: str = Field(
        "prompt_image_file", min_length=1, description="Key of the path of another picture to prompt with; optional."
    )
    caption_extension: str = Field(
        ".txt", min_length=1, description="In a folder of pictures: suffix of the file beside each, with its caption."
    )
    missing_captions: Literal["error", "empty"] = Field(
        "error", description="In a folder: a picture without a caption file is a fault, or has the empty caption."
    )
    picture_hashes_file: str = Field(
        "", description="List of the pictures' SHA-256, as `sha256sum` writes it; a picture of another hash is a fault."
    )
    allow_outside_root: bool = Field(False, description="Take absolute paths, '..' and links that leave the root.")
    alpha_ground: str = Field(
        "white", description="Colour under transparent pictures: white, black, gray or '#rrggbb'."
    )
    min_side_px: int = Field(16, ge=1, description="Pictures with a shorter side than this are faults.")
    max_aspect: float = Field(10.0, ge=1, description="Pictures longer than this many times their width are faults.")
    max_picture_megapixels: float = Field(
        64.0, gt=0, le=MOST_MEGAPIXELS, description="Pictures of more pixels are faults, found before decoding."
    )
    max_pixels_per_byte: float = Field(
        250.0, gt=0, description="Pictures over 4 megapixels with more pixels to a byte of their file are faults."
    )
    max_picture_mb: float = Field(128.0, gt=0, description="Picture files of more MB are faults.")
    max_fault_rate: float = Field(
        0.01, ge=0, le=1, description="Share of faulty rows above which the run stops (exit 3); 0: at the first."
    )
    dataloader_num_workers: int = Field(
        0, ge=0, le=512, description="Processes that read pictures; 0: the main process reads."
    )

    @field_validator("caption_extension")
    @classmethod
    def _with_dot(cls, value: str) -> str:
        if "/" in value:
            raise ValueError(f"{value!r} is no suffix; give one as .txt")
        return f".{value.removeprefix('.')}".lower()

    @field_validator("alpha_ground")
    @classmethod
    def _known_colour(cls, value: str) -> str:
        parse_colour(value)
        return value


class CutConfig(ReadConfig):
    """How rows become targets and image prompts."""

    resume = Resume(
        must_match="resolution center_crop random_flip aspect_ratio_buckets bucket_step_px bucket_max_aspect "
        "prompt_crop_min_share prompt_flip prompt_pad_square",
        free="data_timeout_s",
    )

    resolution: int = Field(512, gt=0, le=16384, description="Side of the training images in pixels; a multiple of 8.")
    center_crop: bool = Field(True, description="Crop at the centre; off: at a random place.")
    random_flip: bool = Field(False, description="Mirror half of the pictures, target and prompt alike.")
    aspect_ratio_buckets: bool = Field(
        False, description="Cut each picture to the nearest of several aspect ratios instead of a square."
    )
    bucket_step_px: int = Field(64, gt=0, description="Sides of the buckets are multiples of this; itself one of 8.")
    bucket_max_aspect: float = Field(2.0, ge=1, description="Largest aspect ratio of a bucket, long side over short.")
    prompt_crop_min_share: float = Field(
        1.0, gt=0, le=1, description="Prompt with a random part of at least this share of the area; 1: with all of it."
    )
    prompt_flip: bool = Field(False, description="Mirror half of the image prompts, whatever happens to the target.")
    prompt_pad_square: bool = Field(
        False, description="Pad image prompts to a square with the alpha ground, so that the encoder crops nothing."
    )
    data_timeout_s: int = Field(
        300, gt=0, description="Longest wait for a data worker in seconds; then the workers are replaced."
    )

    @field_validator("resolution", "bucket_step_px")
    @classmethod
    def _whole_latents(cls, value: int) -> int:
        if value % LATENT_STEP_PX:
            below = value // LATENT_STEP_PX * LATENT_STEP_PX
            near = f"{below} or {below + LATENT_STEP_PX}" if below else str(LATENT_STEP_PX)
            raise ValueError(f"{value} is no multiple of {LATENT_STEP_PX}, the pixels of one latent; take {near}")
        return value

    @model_validator(mode="after")
    def _makes_buckets(self) -> CutConfig:
        self.buckets()
        return self

    def buckets(self) -> Buckets:
        """The sizes that training images are cut to."""
        if not self.aspect_ratio_buckets:
            return Buckets.square(self.resolution)
        return Buckets.ladder(self.resolution, step_px=self.bucket_step_px, max_aspect=self.bucket_max_aspect)


class DataConfig(CutConfig):
    """How rows become batches of training images."""

    resume = Resume(
        must_match="text_drop_rate image_drop_rate both_drop_rate",
        may_change="train_batch_size",
        free="prefetch_factor",
    )

    train_batch_size: int = Field(8, gt=0, le=65536, description="Images per process and micro-batch.")
    text_drop_rate: float = Field(0.05, ge=0, le=1, description="Share of images trained without their text.")
    image_drop_rate: float = Field(0.05, ge=0, le=1, description="Share of images trained without image prompt.")
    both_drop_rate: float = Field(0.05, ge=0, le=1, description="Share of images trained without either.")
    prefetch_factor: int = Field(2, gt=0, le=1024, description="Micro-batches that each data worker prepares ahead.")

    @model_validator(mode="after")
    def _rates(self) -> DataConfig:
        total = self.text_drop_rate + self.image_drop_rate + self.both_drop_rate
        if total > 1 + 1e-9:
            names = "text_drop_rate, image_drop_rate and both_drop_rate"
            raise ValueError(f"{names} exclude each other and sum to {total:g}; lower them to 1 or less together")
        return self


class CheckConfig(DataConfig):
    """Read every row and picture of a training set and list the faults, under the data settings of its training."""

    validation_share: float = Field(
        HELD_OUT_SHARE, ge=0, le=0.5, description="As in training: rows that are held out stand in for no faulty one."
    )
    resolution: int = Field(
        0, ge=0, le=16384, description="Count the pictures that training at this resolution enlarges; 0: do not."
    )
    show_faults: int = Field(20, ge=0, description="Faults printed one by one; the rest are counted.")

    def buckets(self) -> Buckets:
        """The sizes that training images are cut to, at training's own resolution where none is given."""
        usual = {} if self.resolution else {"resolution": CutConfig.model_fields["resolution"].default}
        return CutConfig.buckets(self.model_copy(update=usual))
