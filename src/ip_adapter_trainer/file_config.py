"""Settings of the commands that deal with adapter files: `ip-adapter export` and `ip-adapter inspect`."""

from __future__ import annotations

from typing import Annotated, Literal

import tyro
from pydantic import Field

from ip_adapter_trainer.core.settings import Part, alias
from ip_adapter_trainer.diffusion.schedulers import NoiseConfig
from ip_adapter_trainer.loading.config import BaseConfig


class ExportConfig(NoiseConfig, BaseConfig):
    """Turn a checkpoint into an adapter file, verified by reloading it."""

    source: Annotated[str, tyro.conf.Positional] = Field(
        description="A checkpoint-N folder, a run's output folder, an adapter file, or a published script's checkpoint."
    )
    output: Annotated[str, alias("-o")] = Field(description="File to write: .safetensors or .bin.")
    pretrained_model_name_or_path: str | None = Field(
        None,
        description="Base model to verify on: folder, hub id or .safetensors file; None: the one the checkpoint names.",
    )
    image_encoder_path: str | None = Field(
        None, description="Image encoder to verify with: folder or hub id; None: the one that the checkpoint names."
    )
    dtype: Literal["fp16", "bf16", "fp32"] = Field("fp16", description="Type of the written weights.")
    overwrite: bool = Field(False, description="Replace a file of the same name.")


class InspectConfig(Part):
    """Tell what an adapter file holds and who can read it."""

    path: Annotated[str, tyro.conf.Positional] = Field(
        description="Adapter file, checkpoint-N folder or a run's output folder."
    )
    as_json: Annotated[bool, alias("json")] = Field(False, description="Print JSON.")
