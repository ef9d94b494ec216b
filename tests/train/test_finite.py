"""Nothing that is not finite is ever written, and losses far above the usual are told."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ip_adapter_trainer.core.errors import NotFiniteProblem
from ip_adapter_trainer.core.values import Batch
from ip_adapter_trainer.storage.checkpoints import all_checkpoints
from ip_adapter_trainer.train import checkpoint, spikes
from ip_adapter_trainer.train.spikes import Spikes
from ip_adapter_trainer.train.step import Step


def usual(count: int, spread: float = 1.0) -> list[float]:
    chance = random.Random(0)
    return [0.1 * math.exp(chance.gauss(0, spread)) for _ in range(count)]


def told(losses: list[float], watch: Spikes | None = None) -> list[int]:
    watch = watch or Spikes()
    return [number for number, loss in enumerate(losses) if watch.excess(loss) is not None]


@pytest.mark.parametrize("spread", [0.0, 0.1, 1.0])
def test_usual_losses_are_no_spikes(spread: float) -> None:
    assert told(usual(2000, spread)) == []


@pytest.mark.parametrize(("spread", "times"), [(0.1, 3.0), (1.0, 1000.0)])
def test_a_spike_is_told_once(spread: float, times: float) -> None:
    losses = usual(300, spread)
    losses[100:110] = [times * loss for loss in losses[100:110]]
    losses[200] *= times
    assert told(losses) == [100, 200]


def test_nothing_is_unusual_at_first_and_a_run_gets_used_to_a_rise() -> None:
    assert told([0.1] * (spikes.FEWEST - 1) + [1e6]) == []
    losses = [0.1] * 100 + [10.0] * 200
    assert told(losses) == [100]
    assert told([*losses, 100.0]) == [100, 300]


def test_what_is_usual_survives_a_resume() -> None:
    losses = [*usual(150), 1e6, 1e6, *usual(50), 1e6]
    for cut in (100, 151):
        first, second = Spikes(), Spikes()
        before = told(losses[:cut], first)
        second.restore(first.state())
        assert before + [cut + n for n in told(losses[cut:], second)] == told(losses) == [150, 202]


def test_a_runs_spike_is_told_with_its_rows(
    run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(spikes, "FEWEST", 3)
    honest = Step.__call__

    def one_high(self: Step, batch: Batch) -> torch.Tensor:
        return honest(self, batch) * (1e6 if 10 in batch.index.tolist() else 1.0)

    monkeypatch.setattr(Step, "__call__", one_high)
    run(tmp_path / "out", max_train_steps=9, save_steps=100, num_validation_images=0)
    high = [line for line in capsys.readouterr().err.splitlines() if "times the usual" in line]
    assert len(high) == 1 and "step 4: loss " in high[0] and high[0].count("data.json, element ") == 2


@pytest.mark.parametrize("more", [
    {}, {"use_ema": True}, {"learning_rate": 1e6}
], ids=["live", "averaged", "beyond_fp16"])  # fmt: skip
def test_weights_that_are_not_finite_are_not_saved(
    run: Callable, tmp_path: Path, more: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    """At once, where the gradient that led to them was finite."""
    with pytest.raises(NotFiniteProblem, match=r"not finite, .* and are not saved") as caught:
        huge = {"learning_rate": 1e300, "max_grad_norm": 1e9, "save_steps": 1, "lr_scheduler": "constant"}
        run(tmp_path / "out", **(huge | more))
    assert caught.value.exit_code == 5
    assert all_checkpoints(tmp_path / "out") == [] and "saved checkpoint" not in capsys.readouterr().err


def test_the_last_checkpoint_before_is_good(run: Callable, tmp_path: Path) -> None:
    output = run(tmp_path / "out", max_train_steps=2)
    with pytest.raises(NotFiniteProblem):
        run(output, learning_rate=1e300, save_steps=1, resume_from_checkpoint="latest")
    assert [folder.name for folder in all_checkpoints(output)] == ["checkpoint-2"]
    run(output, resume_from_checkpoint="latest")
    assert all(value.isfinite().all() for value in checkpoint.read(output / "checkpoint-4").weights.values())
