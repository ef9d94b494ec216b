"""A run as its checkpoints tell of it, beside the state; and the check whether another run may go on from one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ip_adapter_trainer.card import card_of
from ip_adapter_trainer.core.log import say
from ip_adapter_trainer.loading.config import loaded_with
from ip_adapter_trainer.model import Model
from ip_adapter_trainer.runtime.launch import Runtime
from ip_adapter_trainer.storage.staging import was_claimed
from ip_adapter_trainer.train import checkpoint, guard
from ip_adapter_trainer.train.aside import set_aside
from ip_adapter_trainer.train.config import TrainConfig
from ip_adapter_trainer.train.fit import Fit
from ip_adapter_trainer.train.metrics import cut_metrics
from ip_adapter_trainer.train.run_plan import RunPlan
from ip_adapter_trainer.train.starting import StartingPoint
from ip_adapter_trainer.train.state import TrainState

WriteResolved = Callable[[TrainConfig, Path], Path]


@dataclass
class RunRecord:
    """A run as its checkpoints remember it."""

    config: TrainConfig
    model: Model
    plan: RunPlan
    identity: guard.RunIdentity
    fit: Fit
    accepted: list[str] = field(default_factory=list)  # differences to the runs that it went on from

    def restore(self, state: TrainState, folder: Path) -> None:
        """Take up the run where a checkpoint left it.

        Raises:
            Problem: a damaged checkpoint, or rows, batch or settings that do not belong to it.
        """
        saved = checkpoint.read(folder)
        accepted = guard.check(saved.state, self.config, self.identity)
        self.accepted = [*saved.state.get("accepted", []), *(f"at step {saved.step}: {what}" for what in accepted)]
        state.load_state_dict(saved)
        say(f"resuming from {folder.name}")

    def snapshot(self, state: TrainState) -> checkpoint.Snapshot:
        """Copy the state as it is now, and all that tells of its run."""
        step, config = state.global_step, self.config
        seen, base = step * self.plan.images_per_step, config.pretrained_model_name_or_path
        card = card_of(self.model, base=base, step=step, images_seen=seen, loaded_with=loaded_with(config))
        told = {
            "config": config.model_dump(mode="json"),
            **self.identity.to_json(),
            "accepted": self.accepted,
            "fit": asdict(self.fit),
            "warmup_steps": self.plan.warmup_steps,
            **state.state_dict(),  # before the average takes the live weights' place
        }
        with state.published_weights() as weights:
            return checkpoint.take(step, weights, card, told)


def take_up(
    record: RunRecord, state: TrainState, point: StartingPoint, runtime: Runtime, write_resolved: WriteResolved
) -> None:
    """Restore what is resumed; then, if there is something left to train, see to the folder that the run goes on in.

    Nothing is changed before every process has read the checkpoint and found it to be its own.

    Raises:
        Problem: a checkpoint of another run, or another run that came between.
        StorageProblem: the disk refuses.
    """
    output = Path(record.config.output_dir)
    if blind := runtime.total(int(not was_claimed(output))):  # machines that do not see what the first process made
        away = f"{blind} of {runtime.world} processes do not see {output}, which is on another machine's disk"
        say(f"{away}: checkpoints are saved there alone, and to resume, every machine needs them at that path")
    with runtime.agreed():
        if runtime.is_main:
            point.demand_unchanged(output)
        if point.folder:
            record.restore(state, point.folder)
    with runtime.agreed():
        if runtime.is_main:
            if state.global_step < record.plan.total_steps:
                set_aside(output, point.folder, state.global_step)
                write_resolved(record.config, output)
            cut_metrics(output, state.global_step if point.is_own else -1, state.validated)
