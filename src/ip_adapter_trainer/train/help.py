"""The help of `train`: its settings in groups, of which the first holds what most runs need, and two examples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic.fields import FieldInfo

from ip_adapter_trainer.core.settings import Part
from ip_adapter_trainer.train.config import TrainConfig

Groups = dict[str, dict[str, FieldInfo]]  # settings by their names, by the group that lists them

ESSENTIAL = (
    "pretrained_model_name_or_path", "image_encoder_path", "data_json_file", "data_root_path", "output_dir", "config",
    "variant", "pretrained_ip_adapter_path", "resolution", "train_batch_size", "max_train_steps", "num_train_epochs",
    "learning_rate", "mixed_precision", "low_memory", "save_steps", "resume_from_checkpoint", "validation_steps",
    "report_to", "dry_run",
)  # fmt: skip
# The others are in the group that their own class names.
GROUPS = ("Essential", "Data", "Objective", "Optimizer", "Memory and speed", "Validation", "Checkpoint", "Advanced")
# No setting: it is not written into the file that it names.
CONFIG = FieldInfo(
    annotation=str | None,  # type: ignore[arg-type]
    default=None,
    description="YAML file of settings, such as a run's own config.yaml; flags go over it.",
)


def grouped(kind: type[TrainConfig], own: Mapping[str, type[Part]]) -> Groups:
    """Return the settings of a run in groups; what it has chosen, as its variant, has a group of its own."""
    owners: dict[str, Any] = {n: part for part in reversed(kind.__mro__) for n in vars(part).get("__annotations__", ())}
    titles = {name: title for title, part in own.items() for name in part.model_fields}
    groups: Groups = {title: {} for title in GROUPS}
    groups["Essential"] = {name: CONFIG if name == "config" else kind.model_fields[name] for name in ESSENTIAL}
    for name, info in kind.model_fields.items():
        if name not in ESSENTIAL:
            groups.setdefault(titles.get(name) or owners[name].group, {})[name] = info
    return groups


def about(prog: str, groups: Groups) -> str:
    """Return the text above the help: what it is for, examples, and where the other settings are."""
    count = sum(map(len, groups.values()))
    return f"""Train an image-prompt adapter.

Examples:
  {prog} --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \\
    --image_encoder_path h94/IP-Adapter/models/image_encoder --data_json_file data.json --output_dir run
  {prog} --config run/config.yaml --resume_from_checkpoint latest --max_train_steps 50000

`{prog} --help-all` lists all {count} settings."""
