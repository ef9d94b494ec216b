"""Demands on a checkpoint before a run takes it up: a folder that a stranger sent has true hashes too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from ip_adapter_trainer.core.errors import Problem
from ip_adapter_trainer.manifest.fingerprint import SIDE
from ip_adapter_trainer.train.config import OptimConfig

_MOMENTS = ("exp_avg", "exp_avg_sq", "state1", "state2", "momentum_buffer")  # AdamW's, in 8 bits too, and Muon's
_REMEDY = "resume from another checkpoint; train on from these weights with --pretrained_ip_adapter_path"
_Count = Annotated[int, Field(ge=0, lt=2**62)]


class _RowSums(BaseModel):
    """See `manifest.fingerprint.Fingerprint.to_json`."""

    model_config = ConfigDict(strict=True)

    sha256: str
    rows: _Count
    lines: str = Field(pattern=r"^(?:[0-9a-f]{16})*$")
    columns: str = Field(pattern=rf"^[0-9a-f]{{{16 * SIDE}}}$")


class _Spikes(BaseModel):
    """See `train.spikes.Spikes.state`."""

    model_config = ConfigDict(strict=True)

    logs: list[float]
    is_high: bool


class _Settings(BaseModel):
    """The part of a checkpoint's state that tells which run it is of."""

    model_config = ConfigDict(extra="allow", strict=True)

    config: dict[str, Any]
    rows: str
    row_sums: _RowSums | None = None
    models: dict[str, str] = {}
    images_per_step: Annotated[int, Field(gt=0)]
    warmup_steps: _Count | None = None  # not in the first checkpoints


class _Length(BaseModel):
    """Settings of `OptimConfig`."""

    lr_warmup_steps: _Count | None = None
    max_train_steps: _Count | None = None
    num_train_epochs: _Count = 1


class _State(_Settings):
    """Kinds of the values that every checkpoint has; variants of the loop may add others."""

    accepted: list[str] = []
    spikes: _Spikes | None = None
    optimizer: dict[int, dict[str, Any]]
    scaler: dict[str, Any]
    bad_steps: _Count = 0
    validated: Annotated[int, Field(ge=-1)]


def demand_settings(step: object, state: object, where: Path) -> None:
    """Demand that the state's settings of its run have the types that a run writes.

    Raises:
        Problem: something is missing or of another kind.
    """
    _demand(_Settings, step, state, where)


def demand_state(step: object, state: object, where: Path) -> None:
    """Demand that all of a state's values have the types that a run writes.

    Raises:
        Problem: one that is missing or of another kind.
    """
    _demand(_State, step, state, where)


def _demand(kind: type[BaseModel], step: object, state: object, where: Path) -> None:
    try:
        kind.model_validate(state)
    except ValidationError as error:
        first = error.errors()[0]
        what = f"the checkpoint's state is no run's: {'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise Problem(what, where=str(where), remedy=_REMEDY) from error
    if type(step) is not int or not 0 <= step < 2**62:
        raise Problem("the checkpoint's state is no run's: step", where=str(where), remedy=_REMEDY)


def length_settings(state: Mapping[str, Any]) -> OptimConfig:
    """Return the settings of a checkpoint's run that decide its length and warm-up, the others at their defaults.

    Raises:
        Problem: they are no run's.
    """
    try:
        known = _Length.model_validate(state["config"]).model_dump(exclude_unset=True)
        return OptimConfig(**known)
    except ValidationError as error:
        where = ", ".join(_Length.model_fields)
        raise Problem("the checkpoint's settings are no run's", where=where, remedy=_REMEDY) from error


def demand_fits(
    saved: Mapping[str, Tensor], mine: Mapping[str, Tensor], moments: Mapping[int, Any], trained: Sequence[Tensor]
) -> None:
    """Demand that a checkpoint's weights and moments have this run's names and shapes, before anything is changed.

    Weights are [...] each; the optimizer's moments are those of each trained parameter, by its number.

    Raises:
        Problem: the first that does not fit.
    """
    for name in sorted(saved.keys() | mine.keys()):
        if name not in saved or name not in mine or saved[name].shape != mine[name].shape:
            shapes = [str(list(table[name].shape)) if name in table else "missing" for table in (saved, mine)]
            what = f"the checkpoint does not fit this model: {name} is {shapes[0]}, expected {shapes[1]}"
            raise Problem(what, remedy=_REMEDY)
    for number, entries in moments.items():
        is_known = 0 <= number < len(trained)
        for name in _MOMENTS:
            entry = entries.get(name)
            if not is_known or (entry is not None and getattr(entry, "shape", None) != trained[number].shape):
                what = f"the checkpoint's optimizer does not fit this model: {name} of parameter {number}"
                raise Problem(what, remedy=_REMEDY)
