"""Settings of frozen models: which they are, which files of them, and how they are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from pydantic import Field, ValidationError

from ip_adapter_trainer.core.errors import Problem
from ip_adapter_trainer.core.settings import Part, Resume
from ip_adapter_trainer.diffusion.schedulers import NoiseConfig

P = TypeVar("P", bound=Part)


class FoundConfig(Part):
    """Settings by which a base model is found."""

    resume = Resume(may_change="revision base_config pretrained_vae_model_name_or_path")

    revision: str | None = Field(None, description="Branch, tag or commit of a base model on the hub.")
    base_config: str | None = Field(
        None,
        description="For a base model in one .safetensors file: pipeline folder or hub id with its settings and "
        "tokenizers; None: the hub's for its kind.",
    )
    pretrained_vae_model_name_or_path: str | None = Field(
        None, description="Another VAE than the base model's own: folder, hub id or .safetensors file."
    )


class BaseConfig(FoundConfig):
    """Settings that name the files of base model and image encoder, and how texts are encoded."""

    resume = Resume(must_match="clip_skip", may_change="weights_variant image_encoder_subfolder")

    weights_variant: str | None = Field(
        None,
        description="Which weight files where there are several: fp16 for *.fp16.safetensors; None: the plain ones.",
    )
    image_encoder_subfolder: str | None = Field(
        None, description="Folder of the image encoder within its path or hub id, as models/image_encoder."
    )
    clip_skip: int | None = Field(
        None,
        ge=1,
        description="SD1.x and SD2.x: read the text encoder's layer so many from its end, as kohya counts: 1 is the "
        "last layer, 2 the one before it; None: the last.",
    )


class FrozenConfig(NoiseConfig, BaseConfig):
    """Settings of the frozen models, and the variant of the adapter that they are for."""

    group = "Advanced"
    resume = Resume(
        of_state="family variant", may_change="pretrained_model_name_or_path image_encoder_path mixed_precision"
    )

    pretrained_model_name_or_path: str = Field(
        description="Base model: a diffusers pipeline folder, a hub id, or a checkpoint in one .safetensors file."
    )
    image_encoder_path: str = Field(
        description="Image encoder: folder or hub id of a CLIPVisionModelWithProjection, as "
        "h94/IP-Adapter/models/image_encoder."
    )
    family: str = Field(
        "auto", description="Family of the base model; auto: by the parts that its model_index.json names."
    )
    variant: str = Field("base", description="Adapter variant: base, plus or full.")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = Field(
        None,
        description="Precision of the frozen weights; the trained ones stay fp32. None: as the launcher says, on "
        "resuming as before, else bf16 where the device computes it, and no (fp32) elsewhere.",
    )


def part_of(config: Part, kind: type[P]) -> P:
    """Return the settings of one part, out of any that hold them; those that are not there stand at their defaults."""
    names = kind.model_fields.keys() & type(config).model_fields.keys()
    return kind(**{name: getattr(config, name) for name in names})


def loaded_with(*parts: Part) -> dict[str, Any]:
    """Return the settings by which frozen models are loaded that are not the defaults, for the adapter's card."""
    own = [part_of(part, kind) for kind in (BaseConfig, NoiseConfig) for part in parts]
    told = [
        (name, field.default, getattr(part, name)) for part in own for name, field in type(part).model_fields.items()
    ]
    return {name: value for name, default, value in told if value != default}


def read_as(kind: type[P], given: Part, remembered: Mapping[str, Any], where: str) -> P:
    """Return settings as given, and where they stand at their defaults as an adapter's card remembers them.

    Raises:
        Problem: the card holds values that cannot be.
    """
    known = {name: value for name, value in remembered.items() if name in kind.model_fields}
    try:
        return kind(**known | {name: value for name, value in loaded_with(given).items() if name in kind.model_fields})
    except ValidationError as error:
        what = f"the adapter's card names settings that cannot be: {error.errors()[0]['msg']}"
        raise Problem(what, where=where, remedy="copy or download the adapter again") from error
