"""The prepared set that a run trains from, if any; with `--prepare auto`, it is prepared first where that pays."""

from __future__ import annotations

import math
from pathlib import Path

from ip_adapter_trainer.cache.prepared import PreparedSet
from ip_adapter_trainer.cache.spec import CacheSpec, random_cuts
from ip_adapter_trainer.core.errors import Problem
from ip_adapter_trainer.core.log import say
from ip_adapter_trainer.manifest.images import ImageFiles
from ip_adapter_trainer.manifest.manifest import Manifest
from ip_adapter_trainer.model import Model
from ip_adapter_trainer.prepare.config import command
from ip_adapter_trainer.prepare.run import Job, demand_preparable
from ip_adapter_trainer.prepare.spec import cache_spec
from ip_adapter_trainer.runtime.launch import Runtime
from ip_adapter_trainer.runtime.stopping import Stopping
from ip_adapter_trainer.train.config import TrainConfig
from ip_adapter_trainer.train.rows import RunRows
from ip_adapter_trainer.train.run_plan import total_steps

_SMALL_TEXT_BYTES = 10**9
_PAYS_EPOCHS = 2  # for each encoding of an image: one is spent on preparing, the rest is saved


def prepared_set(
    config: TrainConfig, runtime: Runtime, model: Model, rows: RunRows, stopping: Stopping
) -> PreparedSet | None:
    """Return the set that a run trains from; None: it trains from the images themselves.

    Raises:
        Problem: the set lacks rows, or settings are on under which nothing can be encoded beforehand.
        Stopped: asked to stop while preparing.
    """
    if config.prepare == "auto" or (config.prepare is None and config.prepared_dir is None):
        return _prepared_if_it_pays(config, runtime, model, rows, stopping)
    if config.prepared_dir is None:
        if config.prepare_text:
            what, remedy = "there is no prepared set to keep text in", "give --prepared_dir, or --prepare auto"
            raise Problem(what, where="--prepare_text", remedy=remedy)
        return None
    demand_preparable(config)
    return _opened(
        config, runtime, rows.manifest, _spec(config, model, text=config.prepare_text), Path(config.prepared_dir)
    )


def _spec(config: TrainConfig, model: Model, *, text: bool) -> CacheSpec:
    return cache_spec(config, model.codec, model.encoders, model.variant.needs, text=text)


def _text_bytes(spec: CacheSpec, manifest: Manifest) -> int:
    """Return what all captions take at most."""
    captions = sum(len(row.captions) for row in manifest.rows)
    return captions * sum(kind.row_bytes for kind in (spec.text.tables if spec.text else ()))


def _opened(config: TrainConfig, runtime: Runtime, manifest: Manifest, spec: CacheSpec, folder: Path) -> PreparedSet:
    """Return the set, after the processes of each machine have together looked for every row in their copy of it."""
    if folder.exists() and not folder.is_dir():
        raise Problem("the prepared set is no folder", where=str(folder), remedy="give another --prepared_dir")
    prepared = PreparedSet(folder, spec, ImageFiles.of(manifest.root, config))
    mine = prepared.lacking(manifest.rows, runtime.portion(len(manifest.rows)))
    lacking = sorted(set().union(*runtime.gathered(list(mine))))
    if lacking:
        what = f"the prepared set lacks {len(lacking)} of {len(manifest.rows)} rows as these settings need them"
        where = f"{folder}{'' if mine else ' of another process'}; the first: {manifest.where(lacking[0])}"
        alone = ", on each machine that has a disk of its own" if runtime.local_world < runtime.world else ""
        remedy = f"run{alone}: {command(config.model_copy(update={'prepared_dir': str(folder)}))}"
        raise Problem(what, where=where, remedy=remedy)
    return prepared


def _prepared_if_it_pays(
    config: TrainConfig, runtime: Runtime, model: Model, rows: RunRows, stopping: Stopping
) -> PreparedSet | None:
    """Prepare the set first, or return None to train from the images; say which, and why."""
    if anew := random_cuts(config):
        say(f"not preparing: {' and '.join(anew)} cut each image otherwise every time")
        return None
    folder = Path(config.prepared_dir or Path(config.output_dir) / "prepared")
    spec = _spec(config, model, text=True)
    if not config.prepare_text and _text_bytes(spec, rows.manifest) > _SMALL_TEXT_BYTES:
        spec = _spec(config, model, text=False)
    job = Job(config, runtime, rows.manifest, spec, folder)
    images_per_step = config.images_per_step(runtime.world)
    epochs = total_steps(config, rows.trained, images_per_step) * images_per_step / max(rows.trained, 1)
    least = _PAYS_EPOCHS * (2 if config.random_flip else 1)
    if job.need_bytes and epochs < least:
        say(f"not preparing: {epochs:.1f} epochs, and it pays from {least} on")
        return None
    if not job.fits:
        say(f"not preparing: {math.ceil(job.need_bytes / 1e6)} MB needed, {job.free_bytes // 10**6} MB free")
        return None
    if config.dry_run:
        say(f"would prepare {math.ceil(job.need_bytes / 1e6)} MB in {folder} for {epochs:.1f} epochs")
        return None
    say(f"preparing first: {epochs:.1f} epochs, and it pays from {least} on")
    say(str(job.run(model.codec, model.encoders, config.encode_batch_size, stopping)))
    return _opened(config, runtime, rows.manifest, spec, folder)
