"""One training run: join the processes, load the frozen models, read the rows, resume or begin, train."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from ip_adapter_trainer.adapters import VARIANTS
from ip_adapter_trainer.core.checkpoints import all_checkpoints, newest, verified
from ip_adapter_trainer.core.errors import Problem
from ip_adapter_trainer.core.launch import Runtime, claim, start
from ip_adapter_trainer.core.log import say
from ip_adapter_trainer.core.signals import StopSignal
from ip_adapter_trainer.core.stopping import Stopping
from ip_adapter_trainer.data.manifest import Manifest, read_manifest
from ip_adapter_trainer.diffusion import NoiseProcess, ObjectiveConfig
from ip_adapter_trainer.model import Model
from ip_adapter_trainer.prepare.frozen import load_frozen
from ip_adapter_trainer.train import checkpoint, guard
from ip_adapter_trainer.train.config import TrainConfig
from ip_adapter_trainer.train.encoded import prepared_set
from ip_adapter_trainer.train.loop import Trainer
from ip_adapter_trainer.train.marks import marks_of
from ip_adapter_trainer.train.plan import make_plan
from ip_adapter_trainer.train.posterior import POSTERIOR_IMAGES, tell_of_posterior
from ip_adapter_trainer.train.source import Source
from ip_adapter_trainer.train.step import Step

WriteResolved = Callable[[TrainConfig, Path], Path]


def build_model(config: TrainConfig, runtime: Runtime) -> Model:
    """Loads the frozen models and makes the adapter, its first weights drawn from the run's seed; all on the host."""
    _demand_compilable(config, runtime)
    family, encoder = load_frozen(config, runtime, storage=config.quantize)
    variant = VARIANTS[config.variant]
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        model = Model(family, encoder, variant, config.part(variant.Config), config.adapter_layers)
    if config.gradient_checkpointing:
        model.checkpoint_activations()
    if config.pretrained_ip_adapter_path:
        from ip_adapter_trainer.loading.adapter import read_adapter_into

        read_adapter_into(model, config.pretrained_ip_adapter_path)
        model.silence_others()
        say(f"starting from {config.pretrained_ip_adapter_path}")
    return model


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
        StopSignal() as signal,
        start(
            mixed_precision=config.mixed_precision,
            local_rank=config.local_rank,
            report_to=config.report_to,
            output_dir=config.output_dir,
            logging_dir=config.logging_dir,
        ) as runtime,
    ):
        _demand_own_folder(config)
        stopping = Stopping(signal, runtime)
        trainer = _make_trainer(config, runtime, stopping)
        if config.dry_run:
            return
        claimed = claim(Path(config.output_dir), runtime)
        try:
            _resume(trainer, config)
            if runtime.is_main:
                write_resolved(config, trainer.output)
            trainer.run(stopping)
        finally:
            if claimed:
                claimed.release()


def _make_trainer(config: TrainConfig, runtime: Runtime, stopping: Stopping) -> Trainer:
    manifest = read_manifest(config)
    _demand_same_run(config, runtime, manifest)
    model = build_model(config, runtime)
    marks = marks_of(model)
    model.place_encoders(runtime.device)
    prepared = prepared_set(config, runtime, model, manifest, stopping)
    source = Source(config, runtime, manifest, model.encoder.preprocess, prepared)
    pipeline = model.family.pipeline
    process = NoiseProcess(pipeline.scheduler, config.part(ObjectiveConfig))
    plan = make_plan(model, config, source.rows, source.images_per_step)
    say("\n".join(plan.lines()))
    if prepared:
        model.release_encoders(texts=config.prepare_text)
    model.place(runtime.device)  # last: encoders that are let go of need no room beside it
    where = f"{runtime.world} x {runtime.device.type}"
    say(f"on {where}, frozen weights {_precision(config, runtime)}, predicting {process.prediction}")
    if config.latents == "sample" and not config.dry_run:
        tell_of_posterior(model, source.fixed(POSTERIOR_IMAGES, config.validation_seed), runtime.device)
    if config.low_memory:
        chosen = {name: getattr(config, name) for name in model.family.small_cards[config.low_memory]}
        say(f"low_memory {config.low_memory}: " + ", ".join(f"{name} {value}" for name, value in chosen.items()))
    return Trainer(config, runtime, model, source, Step(model, process, config.seed, runtime.device), plan, marks)


def _precision(config: TrainConfig, runtime: Runtime) -> str:
    """The frozen weights' precision, for people; with a hint where nobody chose one."""
    if runtime.precision != "no":
        return runtime.precision
    return "fp32" if config.mixed_precision else "fp32 (--mixed_precision bf16 halves them)"


def _demand_own_folder(config: TrainConfig) -> None:
    """Refuses to overwrite a run that was not asked to be resumed, before anything is loaded or written.

    Raises:
        Problem: the output folder holds checkpoints and no resume was asked for.
    """
    if config.resume_from_checkpoint is None and all_checkpoints(Path(config.output_dir)):
        remedy = "give --resume_from_checkpoint latest to go on, or another --output_dir"
        raise Problem("the output folder holds another run's checkpoints", where=config.output_dir, remedy=remedy)


def _demand_same_run(config: TrainConfig, runtime: Runtime, manifest: Manifest) -> None:
    """Refuses to resume what these settings and rows do not belong to, before any model is loaded.

    `Trainer.restore` looks again, at the checkpoint whose files are all whole, and at the models.

    Raises:
        Problem: settings, rows or images per step differ.
    """
    asked = config.resume_from_checkpoint
    has_state = partial(verified, names=[checkpoint.STATE])
    folders = (
        reversed(all_checkpoints(Path(config.output_dir))) if asked == "latest" else [Path(asked)] if asked else []
    )
    folder = next(filter(has_state, folders), None)
    if folder is None:
        return
    images = config.images_per_step(runtime.world)
    identity = guard.Identity(manifest.fingerprint, manifest.where, {}, images, runtime.world)
    guard.check(checkpoint.read_settings(folder), config, identity, tell=lambda line: None)


def _resume(trainer: Trainer, config: TrainConfig) -> None:
    """Takes up the checkpoint that was asked for."""
    asked = config.resume_from_checkpoint
    if asked is None:
        return
    folder = newest(trainer.output, verified) if asked == "latest" else Path(asked)
    if folder is None:
        say("nothing to resume: starting afresh")
        return
    trainer.restore(folder)
