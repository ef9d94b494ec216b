"""Settings of the rows: where they and their images are, and which are refused."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from ip_adapter_trainer.core.settings import Part, Resume, alias
from ip_adapter_trainer.images.background import parse_colour
from ip_adapter_trainer.images.limits import MOST_MEGAPIXELS

HELD_OUT_SHARE = 0.01  # of the images, unless a run says otherwise


class ReadConfig(Part):
    """The rows and their images: where they are, and which are refused."""

    group = "Data"
    resume = Resume(
        must_match="allow_outside_root alpha_background min_side_px max_aspect max_image_megapixels max_image_mb "
        "max_pixels_per_byte",
        may_change="data_json_file data_root_path image_column text_column prompt_image_column image_hashes_file "
        "caption_extension missing_captions",
        free="max_fault_rate dataloader_num_workers data_timeout_s",
    )

    data_json_file: str = Field(
        description="Manifest: a .json, .jsonl, .csv or .tsv file, or a folder of images with captions."
    )
    data_root_path: str = Field("", description="Folder that image paths start from; empty: the manifest's own folder.")
    image_column: str = Field("image_file", min_length=1, description="Key of the image's path in the manifest.")
    text_column: Annotated[str, alias("caption_column")] = Field(
        "text", min_length=1, description="Key of the caption in the manifest."
    )
    prompt_image_column: str = Field(
        "prompt_image_file", min_length=1, description="Key of the path of another image to prompt with; optional."
    )
    caption_extension: str = Field(
        ".txt", min_length=1, description="In a folder of images: suffix of the file beside each, with its caption."
    )
    missing_captions: Literal["error", "empty"] = Field(
        "error", description="In a folder: an image without a caption file is a fault, or has the empty caption."
    )
    image_hashes_file: Annotated[str, alias("picture_hashes_file")] = Field(
        "", description="List of the images' SHA-256, as `sha256sum` writes it; an image of another hash is a fault."
    )
    allow_outside_root: bool = Field(False, description="Take absolute paths, '..' and links that leave the root.")
    alpha_background: Annotated[str, alias("alpha_ground")] = Field(
        "white", description="Colour under transparent images: white, black, gray or '#rrggbb'."
    )
    min_side_px: int = Field(16, ge=1, description="Images with a shorter side than this are faults.")
    max_aspect: float = Field(10.0, ge=1, description="Images longer than this many times their width are faults.")
    max_image_megapixels: Annotated[float, alias("max_picture_megapixels")] = Field(
        64.0, gt=0, le=MOST_MEGAPIXELS, description="Images of more pixels are faults, found before decoding."
    )
    max_pixels_per_byte: float = Field(
        250.0, gt=0, description="Images over 4 megapixels with more pixels to a byte of their file are faults."
    )
    max_image_mb: Annotated[float, alias("max_picture_mb")] = Field(
        128.0, gt=0, description="Image files of more MB are faults."
    )
    max_fault_rate: float = Field(
        0.01, ge=0, le=1, description="Share of faulty rows above which the run stops (exit 3); 0: at the first."
    )
    dataloader_num_workers: int | None = Field(
        None,
        ge=0,
        le=512,
        description="Processes that read images; 0: the main process reads. None: where a GPU trains or encodes from "
        "images, one for each core but one, 8 at most; elsewhere 0.",
    )
    data_timeout_s: int = Field(
        300,
        gt=0,
        description="Longest time in seconds that one of them may take for an image or a batch; then it is replaced.",
    )

    @field_validator("caption_extension")
    @classmethod
    def _with_dot(cls, value: str) -> str:
        if "/" in value:
            raise ValueError(f"{value!r} is no suffix; give one as .txt")
        return f".{value.removeprefix('.')}".lower()

    @field_validator("alpha_background")
    @classmethod
    def _known_colour(cls, value: str) -> str:
        parse_colour(value)
        return value
