"""Settings of prepared sets, shared by `prepare` and `train`."""

from __future__ import annotations

import shlex

from pydantic import Field

from ip_adapter_trainer.cache.config import CutConfig
from ip_adapter_trainer.core.settings import Part, Resume, as_flags
from ip_adapter_trainer.loading.config import FrozenConfig


class SetConfig(Part):
    """Settings of the prepared set."""

    group = "Memory and speed"
    resume = Resume(may_change="prepared_dir prepare_text", free="encode_batch_size")

    prepared_dir: str | None = Field(
        None, description="Prepared set (ip-adapter prepare) to train from; default: encode images at every step."
    )
    prepare_text: bool = Field(
        False,
        description="Keep the text encoders' output for every caption too, however large; where train prepares the "
        "set itself, it does so by itself up to 1 GB.",
    )
    encode_batch_size: int = Field(
        8, gt=0, le=65536, description="Images that are encoded at once while a set is prepared."
    )


class PrepareConfig(SetConfig, CutConfig, FrozenConfig):
    """Encode the images of a training set once, for all later runs."""

    prepared_dir: str = Field("prepared", description="Folder of the prepared set; what is there already is kept.")
    both_features: bool = Field(
        False, description="Keep pooled and penultimate features alike, for runs of any variant."
    )
    more_image_encoders: tuple[str, ...] = Field(
        (), description="Further image encoders, one after the other, for runs with any of them: folders or hub ids."
    )
    local_rank: int = Field(-1, description="Process number for launchers that pass a flag instead of LOCAL_RANK.")


def command(config: Part) -> str:
    """Return the shell command that prepares the set for a run with these settings."""
    fields = PrepareConfig.model_fields
    values = config.model_dump(mode="json")
    chosen = {name: values[name] for name, field in fields.items() if name in values and values[name] != field.default}
    return shlex.join(["ip-adapter", "prepare", *as_flags(chosen)])
