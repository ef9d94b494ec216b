"""The rows of a run: those that are trained on, and those that only validation looks at."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ip_adapter_trainer.core.launch import Runtime
from ip_adapter_trainer.core.log import say
from ip_adapter_trainer.data.hold_out import hold_out
from ip_adapter_trainer.data.manifest import Manifest, read_alike, usable_manifest
from ip_adapter_trainer.train.config import TrainConfig


@dataclass(frozen=True)
class RunRows:
    """Rows as they were read, before any image is.

    Attributes:
        manifest: the training set, held-out rows included: rows keep their numbers.
        held_out: which of its rows are not trained on, [rows].
        validation: another set that validation looks at in their place.
    """

    manifest: Manifest
    held_out: NDArray[np.bool_]
    validation: Manifest | None = None

    @property
    def trained(self) -> int:
        """Number of rows that are trained on."""
        return len(self.held_out) - int(self.held_out.sum())

    def tell(self, config: TrainConfig) -> None:
        """Say what validation looks at, unless it looks at nothing."""
        if not config.validates:
            return
        if self.validation:
            say(f"validation looks at {self.validation.source} ({len(self.validation.rows):,} rows)")
        if self.held_out.any():
            held, rows = int(self.held_out.sum()), len(self.held_out)
            say(f"held out: {held:,} of {rows:,} rows are for validation only (--validation_share 0 trains on all)")
        elif not self.validation:
            why = "too few images to hold some out" if config.validation_share else "--validation_share 0"
            remedy = "give other images with --validation_data to see how the adapter does on images that it never saw"
            say(f"nothing is held out ({why}): validation looks at rows that are trained on; {remedy}")


def read_rows(config: TrainConfig, runtime: Runtime) -> RunRows:
    """Read the manifest, choose the rows that are held out, and read the set that stands in for them.

    Raises:
        Problem: a manifest cannot be read.
        DataProblem: more of its rows are faulty than the settings allow.
    """
    manifest = read_alike(config, runtime)
    held_out = hold_out(manifest.rows, config.validation_share or 0)
    with runtime.agreed():
        return RunRows(manifest, held_out, _validation(config) if config.validation_data else None)


def _validation(config: TrainConfig) -> Manifest:
    where = {"data_json_file": config.validation_data, "data_root_path": config.validation_root_path}
    manifest = usable_manifest(config.model_copy(update={**where, "picture_hashes_file": ""}))
    if manifest.faults:
        count = len(manifest.faults)
        say(f"{count} faults in --validation_data, whose rows are left out; the first: {manifest.faults[0]}")
    return manifest
