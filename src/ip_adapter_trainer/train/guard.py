"""The guard of a resumed run: it compares settings, rows and models with the checkpoint's.

Every setting is in one of the lists that its part keeps (`core.settings.Resume`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic_core import to_jsonable_python

from ip_adapter_trainer.core.errors import Problem, did_you_mean
from ip_adapter_trainer.core.log import say
from ip_adapter_trainer.core.settings import Part, as_flags
from ip_adapter_trainer.manifest.fingerprint import Fingerprint
from ip_adapter_trainer.train.config import TrainConfig
from ip_adapter_trainer.train.model_hashes import compared

ROWS, MODELS = "rows", "models"  # beside settings' names, for --accept_changed

# What was done before there was a setting, where that is not the setting's default.
BEFORE: dict[str, Any] = {"optimizer": "adamw", "timestep_density": "uniform", "validation_share": 0.0}


@dataclass(frozen=True)
class RunIdentity:
    """All that tells a run from others, beside its settings."""

    rows: Fingerprint
    where: Callable[[int], str]  # a row's place in its manifest, by its number
    models: Mapping[str, str]  # a short hash of each frozen part, by its name
    images_per_step: int  # over all processes and micro batches
    world: int  # processes

    def to_json(self) -> dict[str, Any]:
        """Return the identity as a checkpoint keeps it."""
        own = {"images_per_step": self.images_per_step, "models": dict(self.models)}
        return {"rows": self.rows.sha256, "row_sums": self.rows.to_json(), **own}


@dataclass(frozen=True)
class Difference:
    """Something that must match and does not; `accepts` is its name for --accept_changed, else it cannot be."""

    what: str
    remedy: str
    accepts: str = ""


def check(
    saved: Mapping[str, Any], config: TrainConfig, identity: RunIdentity, tell: Callable[[str], None] = say
) -> list[str]:
    """Compare a checkpoint's run with this one, tell each difference, and return those that were accepted.

    The checkpoint saved `config` and all of `RunIdentity.to_json`; models that this run does not name are not compared.

    Raises:
        Problem: something that must match differs, and is not accepted; each is named, with what to do.
    """
    known = [ROWS, MODELS, *type(config).resume_lists()["must_match"]]
    for name in config.accept_changed:
        if name not in known:
            what = f"{name!r} is nothing that a resumed run can accept to have changed"
            raise Problem(what, where="--accept_changed", remedy=did_you_mean(name, known))
    found = [*_settings(saved["config"], config, tell), *_rows(saved, identity)]
    found += [*_models(saved, identity, tell), *_batch(saved["images_per_step"], identity, config)]
    wrong = [d for d in found if d.accepts not in config.accept_changed]
    if wrong:
        names = " ".join(dict.fromkeys(d.accepts for d in found if d.accepts))
        ways = list(dict.fromkeys(d.remedy for d in wrong))
        ways += [f"go on deliberately with --accept_changed {names}"] if all(d.accepts for d in wrong) else []
        ways.append("train on in a new --output_dir from --pretrained_ip_adapter_path")
        what = "this run cannot be resumed as another one: " + "; ".join(d.what for d in wrong)
        raise Problem(what, where="--resume_from_checkpoint", remedy="; or ".join([", ".join(ways[:-1]), ways[-1]]))
    for difference in found:
        tell(f"WARNING: resuming although {difference.what} (--accept_changed {difference.accepts})")
    return [difference.what for difference in found]


def _settings(saved: Mapping[str, Any], config: Part, tell: Callable[[str], None]) -> Iterator[Difference]:
    """Settings that must match and do not; the others are told.

    A setting that the checkpoint's version did not have yet stood at `BEFORE`, else at its default. One that its part
    puts into no list, as those of variants from elsewhere may be, must match.
    """
    lists = config.resume_lists()
    new = config.model_dump(mode="json")
    old = to_jsonable_python({k: f.default for k, f in type(config).model_fields.items() if not f.is_required()})
    old |= {k: v for k, v in BEFORE.items() if k in old} | config.current_names(saved)
    for name in (name for name in new if name not in lists["free"] and old.get(name) != new[name]):
        before, after = old.get(name), new[name]
        if name in lists["may_change"]:
            tell(f"resuming with {name} {after!r} (was {before!r})")
            continue
        flag = " ".join(as_flags({name: before})) or f"no --{name}"
        accepts = name if name in lists["must_match"] else ""
        yield Difference(f"{name} was {before!r}, is {after!r}", f"give {flag}", accepts)


def _rows(saved: Mapping[str, Any], identity: RunIdentity) -> Iterator[Difference]:
    if saved["rows"] == identity.rows.sha256:
        return
    what = "the training rows changed"
    if "row_sums" in saved:  # not in the first checkpoints
        old = Fingerprint.from_json(saved["row_sums"])
        row = old.changed_row(identity.rows)
        now = "" if row is None else f", now {identity.where(row)}"
        what += f" ({old.difference(identity.rows)}{now})"
    yield Difference(what, "restore the manifest", ROWS)


def _models(saved: Mapping[str, Any], identity: RunIdentity, tell: Callable[[str], None]) -> Iterator[Difference]:
    changed, untold = compared(saved.get("models", {}), identity.models)  # none in the first checkpoints
    if untold:
        tell(f"loaded in another precision than before and so not compared: {', '.join(untold)}")
    if changed:
        what = f"other weights or settings than before: {', '.join(changed)}"
        yield Difference(what, "give the models that the run began with", MODELS)


def _batch(old: int, identity: RunIdentity, config: TrainConfig) -> Iterator[Difference]:
    """Images per optimizer step must survive any change of processes, batch or accumulation: the order is by them."""
    if old == identity.images_per_step:
        return
    what = f"a step had {old} images and would have {identity.images_per_step}"
    split = identity.world * config.gradient_accumulation_steps
    remedy = f"choose train_batch_size x processes x gradient_accumulation_steps = {old}"
    yield Difference(what, f"give --train_batch_size={old // split}" if old % split == 0 else remedy)
