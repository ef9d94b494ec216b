"""The rows of a run: those that are trained on, and those that only validation looks at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ip_adapter_trainer.core.errors import Problem
from ip_adapter_trainer.core.log import say
from ip_adapter_trainer.evaluate.config import ValidationConfig
from ip_adapter_trainer.feed.config import DataConfig
from ip_adapter_trainer.manifest.hold_out import hold_out, seen_in
from ip_adapter_trainer.manifest.manifest import Manifest, read_alike, usable_manifest
from ip_adapter_trainer.runtime.launch import Runtime
from ip_adapter_trainer.train.config import TrainConfig


@dataclass(frozen=True)
class RunRows:
    """Rows as they were read, before any image is."""

    manifest: Manifest  # the training set, held-out rows included: rows keep their numbers
    held_out: NDArray[np.bool_]  # which of its rows are not trained on, [rows]
    validation: Manifest | None = None  # another set that validation looks at in their place
    looked_at: Sequence[int] = ()  # numbers of that set's rows, but for those that show an image that is trained on

    @property
    def trained(self) -> int:
        """Number of rows that are trained on."""
        return len(self.held_out) - int(self.held_out.sum())

    def tell(self, config: TrainConfig) -> None:
        """Say what validation looks at, and what is held out for it."""
        if self.validation:
            left_out = len(self.validation.rows) - len(self.looked_at)
            but = f", {left_out:,} left out, as they show images that are trained on" if left_out else ""
            say(f"validation looks at {self.validation.source}: {len(self.looked_at):,} rows{but}")
        if self.held_out.any():
            held, rows = int(self.held_out.sum()), len(self.held_out)
            say(f"held out: {held:,} of {rows:,} rows are for validation only (--validation_share 0 trains on all)")
            if {"rows", "validation_share"}.intersection(config.accept_changed) or config.pretrained_ip_adapter_path:
                say("WARNING: held-out rows may have been trained on before; --validation_data takes others")
        elif config.validates and not self.validation:
            why = "too few images, or too many rows share one" if config.validation_share else "--validation_share 0"
            remedy = "give other images with --validation_data to see how the adapter does on images that it never saw"
            say(f"nothing is held out ({why}): validation looks at rows that are trained on; {remedy}")


def read_rows(config: DataConfig, validation: ValidationConfig, runtime: Runtime) -> RunRows:
    """Read the manifest, choose the rows that are held out, and read the set that stands in for them.

    Raises:
        Problem: a manifest cannot be read, or the set has no image that is not trained on.
        DataProblem: more of its rows are faulty than the settings allow.
    """
    manifest = read_alike(config, runtime)
    rows = RunRows(manifest, hold_out(manifest.rows, validation.validation_share or 0, manifest.root))
    with runtime.agreed():
        return _with_validation(rows, of_validation(config, validation)) if validation.validation_data else rows


def of_validation(config: DataConfig, validation: ValidationConfig) -> DataConfig:
    """Return the settings by which the other set is read: hashes are listed of training images."""
    where = {"data_json_file": validation.validation_data, "data_root_path": validation.validation_root_path}
    return config.model_copy(update={**where, "image_hashes_file": ""})


def _with_validation(rows: RunRows, config: DataConfig) -> RunRows:
    other, trained = usable_manifest(config), rows.manifest
    if other.faults:
        count = len(other.faults)
        say(f"{count} faults in --validation_data, whose rows are left out; the first: {other.faults[0]}")
    unseen = np.flatnonzero(~seen_in(other.rows, other.root, trained.rows, trained.root)).tolist()
    if not unseen:
        what = "all rows of the validation set show images that are trained on"
        remedy = "give other images (of a folder with splits, the split: FOLDER/validation), or leave it out"
        raise Problem(what, where=f"--validation_data {other.source}", remedy=f"{remedy}: some rows are held out then")
    return replace(rows, validation=other, looked_at=unseen)
