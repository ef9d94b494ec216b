"""What a resumed run may change. Every setting must match, may change and is told, or is free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic_core import to_jsonable_python

from ip_adapter_trainer.core.errors import Problem
from ip_adapter_trainer.core.log import say
from ip_adapter_trainer.core.settings import Part

# These may change between a run and its resumption, and the run says so.
MAY_CHANGE = frozenset(
    "learning_rate weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm lr_scheduler lr_warmup_steps "  # noqa: SIM905
    "lr_num_cycles lr_power ema_decay num_train_epochs max_train_steps mixed_precision gradient_checkpointing "
    "lean_layers product_convolutions lean_attention channels_last quantize compile "
    "pretrained_model_name_or_path image_encoder_path data_json_file data_root_path image_column text_column "
    "prompt_image_column picture_hashes_file train_batch_size gradient_accumulation_steps prepared_dir prepare "
    "prepare_text".split()
)
# These say nothing of what is trained.
FREE = frozenset(
    "output_dir save_steps checkpoints_total_limit resume_from_checkpoint logging_dir report_to tracker_project_name "  # noqa: SIM905
    "logging_steps local_rank dry_run validation_steps num_validation_images validation_seed grid_rows grid_steps "
    "grid_guidance_scale grid_prompt dataloader_num_workers prefetch_factor data_timeout_s max_fault_rate "
    "pretrained_ip_adapter_path encode_batch_size low_memory".split()
)
# All others must match, so that a new variant's settings are guarded without being listed here.

# What was done before there was a setting, where that is not the setting's default.
BEFORE = {"timestep_density": "uniform"}


def check_settings(saved: Mapping[str, Any], config: Part) -> None:
    """Compares a checkpoint's settings with this run's; tells what changed.

    A setting that the checkpoint's version did not have yet stood at `BEFORE`, else at its default.

    Raises:
        Problem: a setting that must match differs; each is named with both values.
    """
    new = config.model_dump(mode="json")
    old = to_jsonable_python({k: f.default for k, f in type(config).model_fields.items() if not f.is_required()})
    old |= {k: v for k, v in BEFORE.items() if k in old} | dict(saved)
    changed = {k: (old.get(k), new[k]) for k in new if k not in FREE and old.get(k) != new[k]}
    wrong = [f"{k} was {a!r}, is {b!r}" for k, (a, b) in changed.items() if k not in MAY_CHANGE]
    if wrong:
        remedy = "give the old values, or train on in a new --output_dir from --pretrained_ip_adapter_path"
        raise Problem("this run cannot be resumed with other settings: " + "; ".join(wrong), remedy=remedy)
    for key, (before, after) in changed.items():
        say(f"resuming with {key} {after!r} (was {before!r})")


def check_rows(old: str, new: str) -> None:
    """Compares row fingerprints.

    Raises:
        Problem: the manifest has other rows than when the checkpoint was written.
    """
    if old != new:
        remedy = "restore the manifest, or train on in a new --output_dir from --pretrained_ip_adapter_path"
        raise Problem("the training rows changed since the checkpoint", where="--data_json_file", remedy=remedy)


def check_batch(old: int, new: int) -> None:
    """Compares images per optimizer step, which must survive any change of processes, batch or accumulation.

    Raises:
        Problem: the product differs.
    """
    if old != new:
        remedy = f"choose train_batch_size x processes x gradient_accumulation_steps = {old}"
        raise Problem(f"a step had {old} images and would have {new}", where="--train_batch_size", remedy=remedy)
