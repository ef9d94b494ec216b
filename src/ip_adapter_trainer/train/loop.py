"""The training loop: order to batches to gradients to steps, with saves, validations and stops between them.

It knows the `Family` and `Variant` interfaces and no family or variant by name. Its whole state is the number of
steps done, the adapter, the optimizer and (if asked for) the average: every random draw is a function of the seed and
an image's index, so nothing else need be stored for a resumed run to end with the same bytes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ip_adapter_trainer.card import card_of
from ip_adapter_trainer.core.errors import NotFiniteProblem, Stopped, StorageProblem
from ip_adapter_trainer.core.log import say
from ip_adapter_trainer.core.values import Batch
from ip_adapter_trainer.loading.config import loaded_with
from ip_adapter_trainer.model import Model
from ip_adapter_trainer.runtime.launch import Runtime
from ip_adapter_trainer.runtime.stopping import Poll, Stopping
from ip_adapter_trainer.train import checkpoint, guard, optim
from ip_adapter_trainer.train.config import TrainConfig
from ip_adapter_trainer.train.data import TrainingData
from ip_adapter_trainer.train.lean import lean
from ip_adapter_trainer.train.restored import demand_fits
from ip_adapter_trainer.train.run_plan import RunPlan
from ip_adapter_trainer.train.saver import Saver
from ip_adapter_trainer.train.spikes import Spikes
from ip_adapter_trainer.train.step import Step
from ip_adapter_trainer.train.step_metrics import PendingMetrics, StepMetrics
from ip_adapter_trainer.train.track import Track
from ip_adapter_trainer.train.trackers import start_trackers
from ip_adapter_trainer.train.validate import Validator

FP16_SCALE = 4096.0  # of the loss at first; higher, its calibration would look like steps that are not finite
_GO_ON, _LAST, _BROKEN_OFF = range(3)  # what a process makes of a step: the greatest of all processes' counts
MAX_BAD_STEPS = 5  # in a row; then something is wrong that waiting will not mend


class Trainer:
    """One run from its first or resumed step to its last; `model_hashes` are those of its frozen models."""

    def __init__(
        self,
        config: TrainConfig,
        runtime: Runtime,
        model: Model,
        data: TrainingData,
        step: Step,
        plan: RunPlan,
        model_hashes: Mapping[str, str],
    ) -> None:
        self.config, self.runtime, self.model, self.data, self.plan = config, runtime, model, data, plan
        self.identity = guard.RunIdentity(
            data.fingerprint, data.where, model_hashes, plan.images_per_step, runtime.world
        )
        self.output = Path(config.output_dir)
        self.loss_of = step
        parameters = [p for p in model.adapter.parameters() if p.requires_grad]
        self.gradients = optim.Gradients(parameters)
        self.optimizer = optim.make_optimizer(parameters, config)
        self.schedule = optim.make_schedule(self.optimizer, config, plan.total_steps, plan.warmup_steps)
        self.ema = optim.make_ema(model.adapter, config)
        self.scaler = torch.amp.GradScaler(
            runtime.device.type, init_scale=FP16_SCALE, enabled=runtime.precision == "fp16"
        )
        self.validator = Validator(config, model, data, step)
        self.pending = PendingMetrics(runtime.device)
        self.spikes = Spikes()
        self.saver = Saver(self.output, config.checkpoints_total_limit)
        self.global_step = 0  # optimizer steps
        self.validated = -1  # the step of the last validation
        self.saved = 0  # the last step at which a checkpoint was written or tried; before the first is nothing to save
        self.bad_steps = 0  # in a row
        self.stopping = False  # as all processes agreed
        self.accepted: list[str] = []  # differences to the run that was resumed

    # state ------------------------------------------------------------------------------------------------------

    def restore(self, folder: Path) -> None:
        """Takes up the run where a checkpoint left it.

        Raises:
            Problem: a damaged checkpoint, or rows, batch or settings that do not belong to it.
        """
        saved = checkpoint.read(folder)
        state = saved.state
        accepted = guard.check(state, self.config, self.identity)
        self.accepted = [*state.get("accepted", []), *(f"at step {saved.step}: {what}" for what in accepted)]
        live = state.get("live", {}) if self.ema else saved.weights
        demand_fits(live, self.model.adapter.state_dict(), state["optimizer"], self.optimizer.param_groups[0]["params"])
        self.model.adapter.load_state_dict(live)
        merged = self.optimizer.state_dict() | {"state": state["optimizer"]}
        self.optimizer.load_state_dict(merged)
        if self.ema:
            self.ema.load_state_dict(state["ema"])
        if state["scaler"]:  # empty where the run had no scaler, which an enabled one refuses
            self.scaler.load_state_dict(state["scaler"])
        self.bad_steps = state.get("bad_steps", 0)
        if "spikes" in state:  # not in the first checkpoints
            self.spikes.restore(state["spikes"])
        self.global_step = self.saved = saved.step
        self.validated = state["validated"]
        steps = self.plan.total_steps, self.plan.warmup_steps, self.global_step
        self.schedule = optim.make_schedule(self.optimizer, self.config, *steps)
        say(f"resuming from {folder.name}")

    def _state(self) -> dict[str, Any]:
        state: dict[str, Any] = {
            "config": self.config.model_dump(mode="json"),
            **self.identity.to_json(),
            "accepted": self.accepted,
            "optimizer": self.optimizer.state_dict()["state"],
            "scaler": self.scaler.state_dict(),
            "bad_steps": self.bad_steps,
            "spikes": self.spikes.state(),
            "validated": self.validated,
            "warmup_steps": self.plan.warmup_steps,
        }
        if self.ema:
            live = {key: value.clone() for key, value in self.model.adapter.state_dict().items()}
            state |= {"ema": self.ema.state_dict(), "live": live}
        return state

    def save(self, track: Track) -> None:
        """Begins a checkpoint of this very step unless there is one; `finish` waits for it.

        Raises:
            NotFiniteProblem: on every process alike, whose weights are the same.
        """
        if self.saved == self.global_step:
            return
        self._demand_finite()
        track.flush()  # a checkpoint's metrics are written before it
        if self.runtime.is_main:
            self._tell_of(self.saver.settle)
            self.saver.start(self._snapshot())
        self.saved = self.global_step  # on every process alike

    def _demand_finite(self) -> None:
        """A finite gradient can still lead to ruined weights, at a learning rate that is far too large.

        Raises:
            NotFiniteProblem: moments are not finite; weights or their average are not, or not in fp16.
        """
        entries = [value for entry in self.optimizer.state.values() for value in entry.values()]
        state = [value for value in entries if isinstance(value, torch.Tensor)]  # steps may be plain numbers
        weights = [*self.model.adapter.parameters(), *(self.ema.shadow_params if self.ema else [])]
        if not (optim.all_within(optim.LARGEST_WEIGHT, weights) and optim.all_within(optim.LARGEST_MOMENT, state)):
            what = "weights or moments are not finite, or would not be in fp16, and are not saved"
            remedy = "resume from the last checkpoint, which is good, with a lower --learning_rate"
            raise NotFiniteProblem(what, where=f"step {self.global_step}", remedy=remedy)

    def finish(self) -> None:
        """Waits until the last checkpoint is on the disk.

        Raises:
            StorageProblem: the disk refused it, and there will be no later one.
        """
        problem = None
        if self.runtime.is_main:
            try:
                self.saver.finish()
            except StorageProblem as refused:
                problem = refused
        self.runtime.agree(problem)

    def _tell_of(self, saving: Callable[[], None]) -> None:
        """A full disk is reported and training goes on."""
        try:
            saving()
        except StorageProblem as problem:
            say(str(problem))

    def _snapshot(self) -> checkpoint.Snapshot:
        base, seen = self.config.pretrained_model_name_or_path, self.global_step * self.plan.images_per_step
        card = card_of(
            self.model, base=base, step=self.global_step, images_seen=seen, loaded_with=loaded_with(self.config)
        )
        state = self._state()  # before the average takes the live weights' place
        with self.published_weights() as weights:
            return checkpoint.take(self.global_step, weights, card, state)

    def _rescue(self, track: Track) -> None:
        """After an error of any kind, keeps what was trained; the others are not waited for, they may be gone."""
        if not self.runtime.is_main:
            return
        self._tell_of(self.saver.settle)
        if self.saved != self.global_step:
            for metrics in self.pending.read(keep=0):
                self._note(metrics, track)
            try:
                self._demand_finite()
                track.flush()
                self.saver.start(self._snapshot())
                self.saver.finish()
                say(f"saved checkpoint-{self.global_step} before stopping")
            except (NotFiniteProblem, StorageProblem) as problem:
                say(str(problem))

    def published_weights(self) -> Any:
        """A context that gives the state dict to publish: the average where one is kept, else the live weights."""
        return optim.averaged(self.model.adapter, self.ema)

    # the loop ---------------------------------------------------------------------------------------------------

    def run(self, stopping: Stopping) -> None:
        """Trains to the last step.

        Raises:
            Stopped: asked to stop, after saving.
            NotFiniteProblem: loss or gradients were not finite for five steps in a row.
            StorageProblem: the disk refused the last checkpoint.
        """
        start_trackers(self.runtime, self.config)
        begun = self.global_step
        track = Track(self.runtime, self.output, self.plan.total_steps, self.global_step)
        batches = self.data.batches(self.global_step, stopping.poll)
        with stopping.noted(), self.model.attached(), lean(self.model, self.config):
            try:
                self._run(batches, track, stopping)
            except Exception as error:
                if not isinstance(error, (Stopped, StorageProblem)):
                    self._rescue(track)
                raise
            finally:
                track.close()
        if self.stopping:
            say(self._farewell(begun))
            raise Stopped(stopping.exit_code)

    def _farewell(self, begun: int) -> str:
        """Return what a stop leaves behind of a run that began at a step, and how to go on."""
        if self.global_step == begun:
            return "stopped before a step was done: nothing was trained or saved yet; run the same command again"
        saved = f"stopped at step {self.global_step}, saved checkpoint-{self.global_step}"
        return f"{saved}; go on by the same command with --resume_from_checkpoint latest"

    def _run(self, batches: Iterator[Batch], track: Track, stopping: Stopping) -> None:
        if self.global_step:
            self._between_steps(track, stopping, resumed=True)
        while self.global_step < self.plan.total_steps and not self.stopping:
            self._optimize(batches, track, stopping)
            self._learn(track, keep=self.pending.late)
            self._between_steps(track, stopping)
        self._learn(track, keep=0)
        self.save(track)
        self.finish()

    def _between_steps(self, track: Track, stopping: Stopping, resumed: bool = False) -> None:
        """Validation, then the checkpoint that remembers it."""
        self._tell_of(self.saver.check)
        last = self.global_step >= self.plan.total_steps
        validates = self.validator.due(self.global_step, last) and self.validated != self.global_step
        saves = not resumed and (last or self.global_step % self.config.save_steps == 0)
        if validates or saves:
            self._learn(track, keep=0)
        if validates:
            try:
                self._validate(track, stopping)
            except Stopped:
                self.stopping = True
                return
        if saves:
            self.save(track)

    def _validate(self, track: Track, stopping: Stopping) -> None:
        """The first process validates, the others wait; one that is broken off is done again and leaves no numbers."""

        def work(poll: Poll) -> None:
            """Of this process."""
            if self.runtime.is_main:
                with self.published_weights():
                    self.validator(self.global_step, self.output, track, poll)

        begun_bytes = track.metrics_bytes()
        try:
            stopping.together(work)
        except Stopped:
            track.take_back(begun_bytes)
            raise
        self.validated = self.global_step

    def _optimize(self, batches: Iterator[Batch], track: Track, stopping: Stopping) -> None:
        """One optimizer step over all its micro batches on all processes; none, if any of them broke it off to stop.

        A step that was broken off is done again when the run is resumed, with the same draws.
        """
        rows = self._accumulate(batches, track, stopping)
        asked = _BROKEN_OFF if rows is None else _LAST if stopping.asked else _GO_ON
        agreed = self.runtime.highest(asked)
        self.stopping = agreed != _GO_ON
        if rows is None or agreed == _BROKEN_OFF:
            return
        self.gradients.average(self.runtime.world)
        report, rate = self._apply(), self.schedule.get_last_lr()[0]
        self.schedule.step()
        self.global_step += 1
        track.stopwatch.trained(self.plan.images_per_step)
        self.pending.add(self.global_step, rows, rate, report)

    def _accumulate(self, batches: Iterator[Batch], track: Track, stopping: Stopping) -> list[int] | None:
        """The rows of this process's micro batches, their gradients added up; None: asked to stop before the last."""
        self.gradients.zero()
        rows: list[int] = []
        try:
            for _ in range(self.config.gradient_accumulation_steps):
                stopping.poll()
                began = time.monotonic()
                batch = next(batches)
                track.stopwatch.waited(time.monotonic() - began)
                rows += batch.row.tolist()
                loss = self.loss_of(batch) / self.config.gradient_accumulation_steps
                self.scaler.scale(loss).backward()
                self.gradients.add_loss(loss.detach())
        except Stopped:
            return None
        return rows

    def _apply(self) -> torch.Tensor:
        """Unscales, clips and steps, unless something is not finite; gives the step's report, see `Gradients`."""
        self.scaler.unscale_(self.optimizer)
        report = self.gradients.report(self.gradients.clip(self.config.max_grad_norm))
        optim.step_if_finite(self.optimizer, report[2])
        self.scaler.update()  # lowers fp16's scale after a step that was not taken
        if self.ema:
            self.ema.step(self.model.adapter.parameters())
        return report

    def _learn(self, track: Track, keep: int) -> None:
        """Reports and judges the steps whose numbers have come, all but the last `keep`."""
        for metrics in self.pending.read(keep):
            self._note(metrics, track)
            if metrics.is_finite:
                self.bad_steps = 0
                self._note_spike(metrics)
            else:
                self._note_skipped(metrics)

    def _note(self, metrics: StepMetrics, track: Track) -> None:
        track.step(metrics.step, {"loss": metrics.loss, "lr": metrics.rate, "grad_norm": metrics.norm})
        if metrics.step % self.config.logging_steps == 0:
            track.flush()

    def _named(self, metrics: StepMetrics) -> str:
        """The rows of a step, on all processes."""
        return "; ".join(self.data.where(row) for rows in self.runtime.gathered(metrics.rows) for row in rows)

    def _note_spike(self, metrics: StepMetrics) -> None:
        if (times := self.spikes.excess(metrics.loss)) is not None:
            named = self._named(metrics)
            say(f"step {metrics.step}: loss {metrics.loss:.4g}, {times:.3g} times the usual; its rows: {named}")

    def _note_skipped(self, metrics: StepMetrics) -> None:
        self.bad_steps += 1
        named = self._named(metrics)
        say(f"step {metrics.step}: not finite, step skipped ({self.bad_steps} in a row); its rows: {named}")
        if self.bad_steps >= MAX_BAD_STEPS:
            what = f"gradients were not finite for {MAX_BAD_STEPS} steps in a row"
            remedy = "lower --learning_rate, or train with --mixed_precision bf16; the last checkpoint is good"
            raise NotFiniteProblem(what, where=f"step {metrics.step}", remedy=remedy)
