"""Everything that a run changes as it goes on: the adapter, its optimizer, and the few counts beside them.

Every random draw is a function of the seed and an image's index, so nothing else need be stored for a resumed run to
end with the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ip_adapter_trainer.core.errors import NotFiniteProblem
from ip_adapter_trainer.train import optim
from ip_adapter_trainer.train.restored import demand_fits
from ip_adapter_trainer.train.spikes import Spikes

if TYPE_CHECKING:
    from ip_adapter_trainer.model import Adapter
    from ip_adapter_trainer.runtime.launch import Runtime
    from ip_adapter_trainer.train.checkpoint import Saved
    from ip_adapter_trainer.train.config import OptimConfig
    from ip_adapter_trainer.train.run_plan import RunPlan

FP16_SCALE = 4096.0  # of the loss at first; higher, its calibration would look like steps that are not finite


class TrainState:
    """The whole state of a run.

    Attributes:
        ema: the average of the adapter's weights; None: none is kept.
        global_step: optimizer steps that are done.
        validated: the step of the last validation; -1: there was none.
        bad_steps: steps that were not finite, in a row.
    """

    def __init__(self, adapter: Adapter, config: OptimConfig, plan: RunPlan, runtime: Runtime) -> None:
        self.adapter, self._config, self._plan = adapter, config, plan
        trained = [p for p in adapter.parameters() if p.requires_grad]
        self.gradients = optim.Gradients(trained)
        self.optimizer = optim.make_optimizer(adapter, config)
        self.schedule = optim.make_schedule(self.optimizer, config, plan.total_steps, plan.warmup_steps)
        self.ema = optim.make_ema(adapter, config)
        is_scaled = runtime.precision == "fp16"
        self.scaler = torch.amp.GradScaler(runtime.device.type, init_scale=FP16_SCALE, enabled=is_scaled)
        self.spikes = Spikes()
        self.global_step, self.validated, self.bad_steps = 0, -1, 0

    def update(self, world: int) -> tuple[Tensor, float]:
        """Make one optimizer step of the gradients that were added up, unless something is not finite.

        Returns:
            The step's numbers [3] on the device, see `Gradients.report`, and its learning rate.
        """
        self.gradients.average(world)
        self.scaler.unscale_(self.optimizer)
        report = self.gradients.report(self.gradients.clip(self._config.max_grad_norm))
        optim.step_if_finite(self.optimizer, report[2])
        self.scaler.update()  # lowers fp16's scale after a step that was not taken
        if self.ema:
            self.ema.step(self.adapter.parameters())
        rate = self.schedule.get_last_lr()[-1]  # --learning_rate's; the projector's is in proportion
        self.schedule.step()
        self.global_step += 1
        return report, rate

    def published_weights(self) -> AbstractContextManager[dict[str, Tensor]]:
        """Return a context with the state dict [...] to publish: the average if there is one, else the weights."""
        return optim.averaged(self.adapter, self.ema)

    def state_dict(self) -> dict[str, Any]:
        """Return everything but the published weights and the step, as nested JSON values and tensors."""
        state: dict[str, Any] = {
            "optimizer": self.optimizer.state_dict()["state"],
            "scaler": self.scaler.state_dict(),
            "bad_steps": self.bad_steps,
            "spikes": self.spikes.state(),
            "validated": self.validated,
        }
        if self.ema:
            live = {key: value.clone() for key, value in self.adapter.state_dict().items()}
            state |= {"ema": self.ema.state_dict(), "live": live}
        return state

    def load_state_dict(self, saved: Saved) -> None:
        """Go on where a checkpoint left the run.

        Raises:
            Problem: its weights or moments are not this run's.
        """
        state: Mapping[str, Any] = saved.state
        live = state.get("live", {}) if self.ema else saved.weights
        numbered = [p for group in self.optimizer.param_groups for p in group["params"]]
        demand_fits(live, self.adapter.state_dict(), state["optimizer"], numbered)
        self.adapter.load_state_dict(live)
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state["optimizer"]})
        if self.ema:
            self.ema.load_state_dict(state["ema"])
        if state["scaler"]:  # empty where the run had no scaler, which an enabled one refuses
            self.scaler.load_state_dict(state["scaler"])
        if "spikes" in state:  # not in the first checkpoints
            self.spikes.restore(state["spikes"])
        self.global_step, self.validated = saved.step, state["validated"]
        self.bad_steps = state.get("bad_steps", 0)
        steps = self._plan.total_steps, self._plan.warmup_steps, self.global_step
        self.schedule = optim.make_schedule(self.optimizer, self._config, *steps)

    def demand_finite(self) -> None:
        """Demand numbers that can be saved: a finite gradient can still ruin weights, at far too large a rate.

        Raises:
            NotFiniteProblem: moments are not finite; weights or their average are not, or not in fp16.
        """
        entries = [value for entry in self.optimizer.state.values() for value in entry.values()]
        moments = [value for value in entries if isinstance(value, Tensor)]  # steps may be plain numbers
        weights = [*self.adapter.parameters(), *(self.ema.shadow_params if self.ema else [])]
        is_sound = optim.all_within(optim.LARGEST_WEIGHT, weights) and optim.all_within(optim.LARGEST_MOMENT, moments)
        if not is_sound:
            what = "weights or moments are not finite, or would not be in fp16, and are not saved"
            remedy = "resume from the last checkpoint, which is good, with a lower --learning_rate"
            raise NotFiniteProblem(what, where=f"step {self.global_step}", remedy=remedy)
