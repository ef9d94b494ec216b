"""One training run: join the processes, load the frozen models, read the rows, resume or begin, train."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from filelock import FileLock

from ip_adapter_trainer.adapters import VARIANTS
from ip_adapter_trainer.core.checkpoints import all_checkpoints, newest, verified
from ip_adapter_trainer.core.errors import Problem
from ip_adapter_trainer.core.log import say
from ip_adapter_trainer.core.staging import sweep
from ip_adapter_trainer.diffusion import NoiseProcess, ObjectiveConfig
from ip_adapter_trainer.encoders import ClipImageEncoder
from ip_adapter_trainer.families import FAMILIES, family_of
from ip_adapter_trainer.model import Model
from ip_adapter_trainer.train import guard
from ip_adapter_trainer.train.config import TrainConfig
from ip_adapter_trainer.train.launch import Runtime, start
from ip_adapter_trainer.train.loop import Trainer
from ip_adapter_trainer.train.plan import make_plan
from ip_adapter_trainer.train.signals import StopSignal
from ip_adapter_trainer.train.source import Source
from ip_adapter_trainer.train.step import Step

WriteResolved = Callable[[TrainConfig, Path], Path]


def build_model(config: TrainConfig, runtime: Runtime) -> Model:
    """Loads the frozen base and image encoder and makes the adapter, its first weights drawn from the run's seed."""
    entry = FAMILIES[family_of(config.pretrained_model_name_or_path, config.family)]
    family = entry.load(
        config.pretrained_model_name_or_path, config.part(entry.Config), dtype=runtime.dtype, device=runtime.device
    )
    encoder = ClipImageEncoder.load(config.image_encoder_path, dtype=runtime.dtype, device=runtime.device)
    variant = VARIANTS[config.variant]
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        model = Model(family, encoder, variant, config.part(variant.Config))
    model.adapter.to(runtime.device)
    if config.gradient_checkpointing:
        model.checkpoint_activations()
    if config.pretrained_ip_adapter_path:
        from ip_adapter_trainer.loading import read_adapter_into

        read_adapter_into(model, config.pretrained_ip_adapter_path)
        say(f"starting from {config.pretrained_ip_adapter_path}")
    return model


def train(config: TrainConfig, write_resolved: WriteResolved) -> None:
    """Trains as configured; with `dry_run`, prints the plan and trains nothing.

    Args:
        config: resolved settings.
        write_resolved: writes them into the output folder, for the record and for `--config`.

    Raises:
        Problem: bad input, before any file is written.
        Stopped: asked to stop, after saving.
    """
    with StopSignal() as stop:
        runtime = start(
            mixed_precision=config.mixed_precision,
            local_rank=config.local_rank,
            report_to=config.report_to,
            output_dir=config.output_dir,
            logging_dir=config.logging_dir,
        )
        trainer = _prepare(config, runtime)
        if config.dry_run:
            return
        claimed = _claim(Path(config.output_dir), runtime)
        try:
            _resume(trainer, config)
            if runtime.is_main:
                write_resolved(config, trainer.output)
            trainer.run(stop)
        finally:
            if claimed:
                claimed.release()


def _prepare(config: TrainConfig, runtime: Runtime) -> Trainer:
    model = build_model(config, runtime)
    source = Source(config, runtime, model.encoder.preprocess)
    pipeline = model.family.pipeline
    process = NoiseProcess(pipeline.scheduler.config, config.part(ObjectiveConfig))
    # Grids must sample what is trained, where a flag overrules the scheduler's own prediction type.
    pipeline.scheduler.register_to_config(prediction_type=process.prediction)
    plan = make_plan(model, config, source.rows, source.images_per_step)
    say("\n".join(plan.lines()))
    say(f"on {runtime.world} x {runtime.device}, frozen weights {runtime.precision}, predicting {process.prediction}")
    return Trainer(config, runtime, model, source, Step(model, process, config.seed, runtime.device), plan)


def _claim(output: Path, runtime: Runtime) -> FileLock | None:
    """The main process makes and claims the folder and removes what a killed run left half written."""
    claimed = None
    if runtime.is_main:
        output.mkdir(parents=True, exist_ok=True)
        claimed = guard.lock(output)
        sweep(output)
    runtime.barrier()
    return claimed


def _resume(trainer: Trainer, config: TrainConfig) -> None:
    """Takes up the checkpoint that was asked for; refuses to overwrite a run that was not.

    Raises:
        Problem: the output folder holds checkpoints and no resume was asked for.
    """
    asked = config.resume_from_checkpoint
    if asked is None:
        if all_checkpoints(trainer.output):
            remedy = "give --resume_from_checkpoint latest to go on, or another --output_dir"
            raise Problem("the output folder holds another run's checkpoints", where=config.output_dir, remedy=remedy)
        return
    folder = newest(trainer.output, verified) if asked == "latest" else Path(asked)
    if folder is None:
        say("nothing to resume: starting afresh")
        return
    trainer.restore(folder)
