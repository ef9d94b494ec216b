"""One training run, from top to bottom: where it begins, load, feed, plan, optimizer, loop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ip_adapter_trainer.core.errors import Stopped, StorageProblem
from ip_adapter_trainer.core.log import say
from ip_adapter_trainer.diffusion import NoiseProcess, ObjectiveConfig
from ip_adapter_trainer.evaluate.config import ValidationConfig
from ip_adapter_trainer.feed.config import DataConfig
from ip_adapter_trainer.loading.config import part_of
from ip_adapter_trainer.model import Model
from ip_adapter_trainer.prepare.cut import warn_of_cut_captions
from ip_adapter_trainer.runtime.launch import Runtime, claimed, start
from ip_adapter_trainer.runtime.precision import in_words
from ip_adapter_trainer.runtime.signals import StopSignal
from ip_adapter_trainer.runtime.stopping import Stopping
from ip_adapter_trainer.train.build import make_loop, make_model
from ip_adapter_trainer.train.config import LeanConfig, OptimConfig, TrainConfig
from ip_adapter_trainer.train.data import TrainingData
from ip_adapter_trainer.train.encoded import prepared_set
from ip_adapter_trainer.train.fit import fitted
from ip_adapter_trainer.train.guard import RunIdentity
from ip_adapter_trainer.train.lean import lean
from ip_adapter_trainer.train.loop import Loop
from ip_adapter_trainer.train.model_hashes import hash_models
from ip_adapter_trainer.train.posterior import POSTERIOR_IMAGES, warn_of_posterior_noise
from ip_adapter_trainer.train.presets import chosen
from ip_adapter_trainer.train.record import RunRecord, WriteResolved, take_up
from ip_adapter_trainer.train.rows import RunRows, read_rows
from ip_adapter_trainer.train.run_plan import make_plan
from ip_adapter_trainer.train.starting import agreed_starting_point, as_begun, demand_same_run, is_over
from ip_adapter_trainer.train.state import TrainState
from ip_adapter_trainer.train.step import Step
from ip_adapter_trainer.train.trackers import start_trackers, trackers_named


def train(config: TrainConfig, write_resolved: WriteResolved) -> None:
    """Train as configured; with `dry_run`, print the plan and train nothing.

    Args:
        config: resolved settings.
        write_resolved: writes them into the output folder, for the record and for `--config`.

    Raises:
        Problem: bad input, before any file is written.
        Stopped: asked to stop, after saving.
    """
    with joined(config) as (runtime, stopping):
        point = agreed_starting_point(config, runtime)
        config, runtime = as_begun(config, runtime, point)
        rows = read_rows(part_of(config, DataConfig), part_of(config, ValidationConfig), runtime)
        with runtime.agreed():
            demand_same_run(config, runtime, rows.manifest, point)
        if is_over(config, runtime, rows, point):
            return

        with runtime.agreed():
            model = make_model(config, runtime, point)
        process = NoiseProcess(model.denoiser.pipeline.scheduler, part_of(config, ObjectiveConfig))
        hashes = hash_models(model)
        data = feed(config, runtime, model, rows, stopping)
        plan = make_plan(model, config, data.rows, data.images_per_step, point.state)
        model.place(runtime.device)  # last: encoders that were let go of need no room beside it
        say("\n".join(plan.lines()))
        rows.tell(config)
        data.tell(plan.total_steps)
        tell(config, runtime, model, data, process)
        if config.dry_run:
            return

        step = Step(model, process, config.seed, runtime.device)
        fit = fitted(config, step, data, runtime, point)
        state = TrainState(model.adapter, part_of(config, OptimConfig), plan, runtime)
        identity = RunIdentity(data.fingerprint, data.where, hashes, plan.images_per_step, runtime.world)
        record = RunRecord(config, model, plan, identity, fit)
        with claimed(Path(config.output_dir), runtime):
            take_up(record, state, point, runtime, write_resolved)
            start_trackers(runtime, config, config.model_dump(mode="json"))
            run_loop(make_loop(record, state, data, step, runtime, stopping), step, part_of(config, LeanConfig))


@contextmanager
def joined(config: TrainConfig) -> Iterator[tuple[Runtime, Stopping]]:
    """Join the processes of the run and watch for signals that ask it to stop."""
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
        yield runtime, Stopping(signal, runtime)


def feed(config: TrainConfig, runtime: Runtime, model: Model, rows: RunRows, stopping: Stopping) -> TrainingData:
    """Return the rows in order, from images or from a prepared set, which may be prepared first."""
    if runtime.is_main:
        warn_of_cut_captions(rows.manifest, model.codec.tokenizers)
    model.place_encoders(runtime.device)
    prepared = prepared_set(config, runtime, model, rows, stopping)
    preprocess = {role: encoder.preprocess for role, encoder in model.encoders.items()}
    workers = runtime.data_workers(config.dataloader_num_workers, encoded=prepared is not None)
    own = part_of(config, DataConfig).model_copy(update={"dataloader_num_workers": workers})
    looks, images = part_of(config, ValidationConfig), config.images_per_step(runtime.world)
    data = TrainingData(own, looks, runtime, rows, preprocess, prepared, seed=config.seed, images_per_step=images)
    with runtime.agreed():
        data.demand_validation()
    if prepared:
        data.encode_unseen(model)
        model.release_encoders(texts=prepared.spec.text is not None)
    return data


def tell(config: TrainConfig, runtime: Runtime, model: Model, data: TrainingData, process: NoiseProcess) -> None:
    """Say how the models run, and warn of latents that are mostly noise."""
    where = f"on {runtime.world} x {runtime.device.type}, frozen weights {in_words(runtime.precision)}"
    say(f"{where}, predicting {process.prediction}")
    if config.latents == "sample" and runtime.is_main and not config.dry_run:
        warn_of_posterior_noise(model, data.seen.batches(POSTERIOR_IMAGES), runtime.device)
    if config.low_memory:
        say(chosen(config, model.base.family, config.low_memory))


def run_loop(loop: Loop, step: Step, layers: LeanConfig) -> None:
    """Run a loop to its end, the adapter attached; whatever ends it, what was trained is kept.

    Raises:
        Stopped: asked to stop, after saving.
        Problem: see `Loop.run`.
    """
    begun = loop.state.global_step
    with loop.stopping.noted(), step.model.attached(), lean(step.model, layers):
        try:
            loop.run()
        except Exception as error:
            if not isinstance(error, (Stopped, StorageProblem)):
                loop.saving.rescue()
            raise
        finally:
            loop.track.close()
    if loop.stopped:
        now, way = loop.state.global_step, "go on by the same command with --resume_from_checkpoint latest"
        nothing = "stopped before a step was done: nothing was trained or saved yet; run the same command again"
        say(nothing if now == begun else f"stopped at step {now}, saved checkpoint-{now}; {way}")
        raise Stopped(loop.stopping.exit_code)
