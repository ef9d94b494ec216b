"""The model of a run, frozen models loaded and the adapter's first weights drawn or read; and its loop."""

from __future__ import annotations

from pathlib import Path

import torch

from ip_adapter_trainer.adapters import VARIANTS
from ip_adapter_trainer.core.errors import Problem
from ip_adapter_trainer.core.log import say
from ip_adapter_trainer.evaluate.config import ValidationConfig
from ip_adapter_trainer.layouts import choose_layout
from ip_adapter_trainer.loading.adapter import read_adapter_into
from ip_adapter_trainer.loading.config import part_of
from ip_adapter_trainer.loading.frozen import load_frozen
from ip_adapter_trainer.model import Architecture, Model
from ip_adapter_trainer.runtime.launch import Runtime
from ip_adapter_trainer.runtime.stopping import Stopping
from ip_adapter_trainer.train.config import TrainConfig
from ip_adapter_trainer.train.data import TrainingData
from ip_adapter_trainer.train.loop import Loop
from ip_adapter_trainer.train.record import RunRecord
from ip_adapter_trainer.train.saver import Saver
from ip_adapter_trainer.train.saving import Saving
from ip_adapter_trainer.train.starting import StartingPoint
from ip_adapter_trainer.train.state import TrainState
from ip_adapter_trainer.train.step import Step
from ip_adapter_trainer.train.step_log import StepLog
from ip_adapter_trainer.train.track import Track
from ip_adapter_trainer.train.validate import Validator


def make_model(config: TrainConfig, runtime: Runtime, point: StartingPoint) -> Model:
    """Load the frozen models and make the adapter, its first weights drawn from the run's seed; all on the host.

    Raises:
        Problem: something does not load or fit, or settings that do not go together.
    """
    _demand_compilable(config, runtime)
    variant = VARIANTS[config.variant]
    own = part_of(config, variant.Config)
    base, encoders = load_frozen(config, runtime, own, storage=config.quantize)
    layout = choose_layout(config.layout, config.variant, variant.layouts, base.family, base.denoiser.layouts)
    architecture = Architecture(variant, own, layout, part_of(config, layout.Config), config.adapter_layers)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        model = Model(base, encoders, architecture)
    if config.gradient_checkpointing:
        model.checkpoint_activations()
    if config.pretrained_ip_adapter_path:
        _start_from(config.pretrained_ip_adapter_path, model, point)
    return model


def _start_from(path: str, model: Model, point: StartingPoint) -> None:
    """Take an adapter's weights as the first ones, of a run that has none yet."""
    if point.folder:
        say(f"{path} is not read: the weights are those of {point.folder.name}")
        return
    read_adapter_into(model, path)
    model.silence_others()
    say(f"starting from {path}")


def _demand_compilable(config: TrainConfig, runtime: Runtime) -> None:
    """Refuse what compiling cannot go with, before anything is loaded."""
    if config.compile != "off" and config.quantize != "none":
        what = "compiled blocks would hold packed weights in full between forward and backward"
        raise Problem(what, where="--compile --quantize", remedy="leave out one of the two")
    if config.compile == "reduce-overhead" and runtime.device.type != "cuda":
        what = f"reduce-overhead replays CUDA graphs, and this run is on a {runtime.device.type}"
        raise Problem(what, where="--compile", remedy="take --compile on, or off")


def make_loop(
    record: RunRecord, state: TrainState, data: TrainingData, step: Step, runtime: Runtime, stopping: Stopping
) -> Loop:
    """Return the loop of a run from the step at which its state stands."""
    config, plan, output = record.config, record.plan, Path(record.config.output_dir)
    track = Track(runtime, output, plan.total_steps, state.global_step)
    log = StepLog(state, track, runtime, data.where, config.logging_steps)
    saver = Saver(output, config.checkpoints_total_limit)
    return Loop(
        state=state,
        loss_of=step,
        batches=data.batches(output, state.global_step, stopping.poll),
        micro_batches=plan.images_per_step // runtime.world // data.micro_images,
        total_steps=plan.total_steps,
        images_per_step=plan.images_per_step,
        save_steps=config.save_steps,
        validator=Validator(part_of(config, ValidationConfig), output, record.model, data, step),
        saving=Saving(state, saver, lambda: record.snapshot(state), log, runtime),
        log=log,
        track=track,
        runtime=runtime,
        stopping=stopping,
    )
