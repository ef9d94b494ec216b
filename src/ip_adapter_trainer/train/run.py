"""One training run: join the processes, load the frozen models, read the rows, resume or begin, train."""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path

import torch

from ip_adapter_trainer.adapters import VARIANTS
from ip_adapter_trainer.core.errors import Problem
from ip_adapter_trainer.core.log import say
from ip_adapter_trainer.diffusion import NoiseProcess, ObjectiveConfig
from ip_adapter_trainer.families import FAMILIES
from ip_adapter_trainer.layouts import choose_layout
from ip_adapter_trainer.loading.config import part_of
from ip_adapter_trainer.manifest.manifest import Manifest
from ip_adapter_trainer.model import Architecture, Model
from ip_adapter_trainer.prepare.cut import warn_of_cut_captions
from ip_adapter_trainer.prepare.frozen import load_frozen
from ip_adapter_trainer.runtime.launch import Runtime, claim, start
from ip_adapter_trainer.runtime.signals import StopSignal
from ip_adapter_trainer.runtime.stopping import Stopping
from ip_adapter_trainer.storage.checkpoints import complete
from ip_adapter_trainer.storage.staging import was_claimed
from ip_adapter_trainer.train import guard
from ip_adapter_trainer.train.aside import set_aside
from ip_adapter_trainer.train.config import TrainConfig
from ip_adapter_trainer.train.data import TrainingData
from ip_adapter_trainer.train.encoded import prepared_set
from ip_adapter_trainer.train.loop import Trainer
from ip_adapter_trainer.train.metrics import cut_metrics
from ip_adapter_trainer.train.model_hashes import hash_models
from ip_adapter_trainer.train.posterior import POSTERIOR_IMAGES, warn_of_posterior_noise
from ip_adapter_trainer.train.rows import RunRows, read_rows
from ip_adapter_trainer.train.run_plan import make_plan, total_steps
from ip_adapter_trainer.train.starting import StartingPoint, starting_point
from ip_adapter_trainer.train.step import Step
from ip_adapter_trainer.train.trackers import trackers_named

WriteResolved = Callable[[TrainConfig, Path], Path]


def make_model(config: TrainConfig, runtime: Runtime) -> Model:
    """Loads the frozen models and makes the adapter, its first weights drawn from the run's seed; all on the host."""
    _demand_compilable(config, runtime)
    variant = VARIANTS[config.variant]
    own = config.part(variant.Config)
    base, encoders = load_frozen(config, runtime, own, storage=config.quantize)
    layout = choose_layout(config.layout, config.variant, variant.layouts, base.family, base.denoiser.layouts)
    architecture = Architecture(variant, own, layout, part_of(config, layout.Config), config.adapter_layers)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        model = Model(base, encoders, architecture)
    if config.gradient_checkpointing:
        model.checkpoint_activations()
    return model


def _start_from(path: str, model: Model, point: StartingPoint) -> None:
    """Takes an adapter's weights as the first ones, of a run that has none yet."""
    if point.folder:
        say(f"{path} is not read: the weights are those of {point.folder.name}")
        return
    from ip_adapter_trainer.loading.adapter import read_adapter_into

    read_adapter_into(model, path)
    model.silence_others()
    say(f"starting from {path}")


def _demand_compilable(config: TrainConfig, runtime: Runtime) -> None:
    """Refuses what compiling cannot go with, before anything is loaded.

    Raises:
        Problem: packed weights, or CUDA graphs without CUDA.
    """
    if config.compile != "off" and config.quantize != "none":
        what = "compiled blocks would hold packed weights in full between forward and backward"
        raise Problem(what, where="--compile --quantize", remedy="leave out one of the two")
    if config.compile == "reduce-overhead" and runtime.device.type != "cuda":
        what = f"reduce-overhead replays CUDA graphs, and this run is on a {runtime.device.type}"
        raise Problem(what, where="--compile", remedy="take --compile on, or off")


def train(config: TrainConfig, write_resolved: WriteResolved) -> None:
    """Trains as configured; with `dry_run`, prints the plan and trains nothing.

    Args:
        config: resolved settings.
        write_resolved: writes them into the output folder, for the record and for `--config`.

    Raises:
        Problem: bad input, before any file is written.
        Stopped: asked to stop, after saving.
    """
    with (
        StopSignal("nothing was trained yet; run the same command again") as signal,
        start(
            mixed_precision=config.mixed_precision,
            local_rank=config.local_rank,
            trackers=trackers_named(config.report_to),
            output_dir=config.output_dir,
            logging_dir=config.logging_dir,
        ) as runtime,
    ):
        point = _starting_point(config, runtime)
        rows = read_rows(config, runtime)
        with runtime.agreed():
            if point.folder:
                _demand_same_run(config, runtime, rows.manifest, point)
        if point.folder and _is_over(config, runtime, rows, point):
            return
        stopping = Stopping(signal, runtime)
        trainer = _make_trainer(config, runtime, stopping, rows, point)
        if config.dry_run:
            return
        claimed = claim(Path(config.output_dir), runtime)
        _tell_of_unshared(Path(config.output_dir), runtime)
        try:
            _take_up(trainer, point, write_resolved)
            trainer.run(stopping)
        finally:
            if claimed:
                claimed.release()


def _make_trainer(
    config: TrainConfig, runtime: Runtime, stopping: Stopping, rows: RunRows, point: StartingPoint
) -> Trainer:
    with runtime.agreed():
        model = make_model(config, runtime)
        if config.pretrained_ip_adapter_path:
            _start_from(config.pretrained_ip_adapter_path, model, point)
    if runtime.is_main:
        warn_of_cut_captions(rows.manifest, model.codec.tokenizers)
    model_hashes = hash_models(model)
    model.place_encoders(runtime.device)
    prepared = prepared_set(config, runtime, model, rows, stopping)
    preprocess = {role: encoder.preprocess for role, encoder in model.encoders.items()}
    data = TrainingData(config, runtime, rows, preprocess, prepared)
    process = NoiseProcess(model.denoiser.pipeline.scheduler, config.part(ObjectiveConfig))
    plan = make_plan(model, config, data.rows, data.images_per_step, point.state)
    say("\n".join(plan.lines()))
    rows.tell(config)
    data.tell(plan.total_steps)
    with runtime.agreed():
        data.demand_validation()
    if prepared:
        data.encode_unseen(model)
        model.release_encoders(texts=config.prepare_text)
    model.place(runtime.device)  # last: encoders that are let go of need no room beside it
    where = f"{runtime.world} x {runtime.device.type}"
    say(f"on {where}, frozen weights {_precision(config, runtime)}, predicting {process.prediction}")
    if config.latents == "sample" and runtime.is_main and not config.dry_run:
        warn_of_posterior_noise(model, data.seen.batches(POSTERIOR_IMAGES), runtime.device)
    if config.low_memory:
        chosen = {name: getattr(config, name) for name in FAMILIES[model.base.family].small_cards[config.low_memory]}
        say(f"low_memory {config.low_memory}: " + ", ".join(f"{name} {value}" for name, value in chosen.items()))
    return Trainer(config, runtime, model, data, Step(model, process, config.seed, runtime.device), plan, model_hashes)


def _precision(config: TrainConfig, runtime: Runtime) -> str:
    """The frozen weights' precision, for people; with a hint where nobody chose one."""
    if runtime.precision != "no":
        return runtime.precision
    return "fp32" if config.mixed_precision else "fp32 (--mixed_precision bf16 halves them)"


def _starting_point(config: TrainConfig, runtime: Runtime) -> StartingPoint:
    """The first process looks, so that all begin at the same step."""
    point = StartingPoint()
    with runtime.agreed():
        if runtime.is_main:
            point = starting_point(config)
    point = runtime.shared(point)
    with runtime.agreed():
        if point.folder and not complete(point.folder):
            what = "the checkpoint lies on the first machine, and this one does not have it"
            remedy = (
                "put --output_dir on a disk that all machines share, or copy the checkpoint to the same path on each"
            )
            raise Problem(what, where=f"{point.folder.absolute()} on {platform.node()}", remedy=remedy)
    return point


def _tell_of_unshared(output: Path, runtime: Runtime) -> None:
    """Tells of machines that do not see the folder that the first process has just claimed."""
    blind = runtime.total(int(not was_claimed(output)))
    if blind:
        away = f"{blind} of {runtime.world} processes do not see {output}, which is on another machine's disk"
        say(f"{away}: checkpoints are saved there alone, and to resume, every machine needs them at that path")


def _demand_same_run(config: TrainConfig, runtime: Runtime, manifest: Manifest, point: StartingPoint) -> None:
    """Refuses to resume what these settings and rows do not belong to, before any model is loaded.

    `Trainer.restore` looks again, and at the models.

    Raises:
        Problem: settings, rows or images per step differ.
    """
    images = config.images_per_step(runtime.world)
    identity = guard.RunIdentity(manifest.fingerprint, manifest.where, {}, images, runtime.world)
    assert point.state is not None, "it is resumed"
    guard.check(point.state, config, identity, tell=lambda line: None)


def _is_over(config: TrainConfig, runtime: Runtime, rows: RunRows, point: StartingPoint) -> bool:
    """Return whether a resumed run has nothing left to do; that it has nothing left to train is told."""
    total = total_steps(config, rows.trained, config.images_per_step(runtime.world))
    if point.step < total:
        return False
    way = f"give --max_train_steps above {point.step} to go on"
    say(f"nothing left to train: {point.folder} is at step {point.step}, and the run has {total} steps; {way}")
    return not (point.lacks_validation and config.validates) and not config.dry_run


def _take_up(trainer: Trainer, point: StartingPoint, write_resolved: WriteResolved) -> None:
    """Restores what is resumed; then, if there is something left to train, sees to the folder that it goes on in.

    Nothing is changed before every process has read the checkpoint and found it to be its own.
    """
    runtime, output = trainer.runtime, trainer.output
    with runtime.agreed():
        if runtime.is_main:
            point.demand_unchanged(output)
        if point.folder:
            trainer.restore(point.folder)
    with runtime.agreed():
        if runtime.is_main:
            if trainer.global_step < trainer.plan.total_steps:
                set_aside(output, point.folder, trainer.global_step)
                write_resolved(trainer.config, output)
            cut_metrics(output, trainer.global_step if point.is_own else -1, trainer.validated)
