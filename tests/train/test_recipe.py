"""What a run does where its flags say nothing: `ip-adapter train` its own recipe, the published scripts theirs."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from ip_adapter_trainer.config import parse_train
from ip_adapter_trainer.core.errors import Problem
from ip_adapter_trainer.model import Adapter
from ip_adapter_trainer.train.config import PUBLISHED, OptimConfig
from ip_adapter_trainer.train.optim import make_optimizer, make_schedule, warmup_steps
from ip_adapter_trainer.train.starting import StartingPoint, as_begun

EXAMPLES = Path(__file__).parents[2] / "examples" / "ip_adapter"
AS_PUBLISHED = {
    "optimizer": "adamw", "learning_rate": 1e-4, "lr_scheduler": "constant", "lr_warmup_steps": 0, "weight_decay": 0.01,
    "adam_beta1": 0.9, "adam_beta2": 0.999, "use_ema": False, "snr_gamma": None, "prediction_type": "auto",
    "timestep_density": "uniform", "min_timestep": 0, "max_timestep": None, "noise_offset": 0.0,
    "text_drop_rate": 0.05, "image_drop_rate": 0.05, "both_drop_rate": 0.05,
}  # fmt: skip
OWN = AS_PUBLISHED | {
    "optimizer": "muon", "learning_rate": 3e-4, "lr_scheduler": "constant_with_warmup", "lr_warmup_steps": None,
    "timestep_density": "logit_normal", "logit_mean": 0.5, "logit_std": 1.0, "timestep_uniform_share": 0.2,
}  # fmt: skip


def without(flags: list[str], *names: str) -> list[str]:
    return [flag for flag in flags if flag.split("=")[0].removeprefix("--") not in names]


def resolved(output: Path, names: Any) -> dict[str, Any]:
    settings = yaml.safe_load((output / "config.yaml").read_text())
    return {name: settings[name] for name in names}


def script(name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert ended.value.code == 0


@pytest.mark.parametrize(("name", "variant"), [
    ("tutorial_train_ip-adapter.py", "base"), ("tutorial_train_plus.py", "plus"), ("tutorial_train_sdxl.py", "base"),
])  # fmt: skip
def test_the_published_names_keep_the_published_recipe(
    flags: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, variant: str
) -> None:
    script(name, without(flags(tmp_path, max_train_steps=1), "learning_rate"), monkeypatch)
    expected = AS_PUBLISHED | {"variant": variant}
    assert resolved(tmp_path, expected) == expected


def test_flags_and_files_go_over_a_scripts_own_defaults(
    flags: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file.yaml"
    file.write_text(yaml.safe_dump({"timestep_shift": 2.0, "lr_scheduler": "cosine", "lr_warmup_steps": None}))
    arguments = [*flags(tmp_path, max_train_steps=1, timestep_density="shifted"), f"--config={file}"]
    script("tutorial_train_plus.py", arguments, monkeypatch)
    expected = {"variant": "plus", "learning_rate": 1e-3, "timestep_density": "shifted", "timestep_shift": 2.0}
    expected |= {"lr_scheduler": "cosine", "lr_warmup_steps": None}
    assert resolved(tmp_path, expected) == expected


def test_a_scripts_help_shows_its_own_defaults(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script("tutorial_train_plus.py", ["--help"], monkeypatch)
    said = capsys.readouterr().out
    assert "(default: 0.0001)" in said and "(default: plus)" in said


def test_train_records_its_own_recipe(run: Callable, flags: Callable, tmp_path: Path) -> None:
    config = parse_train(without(flags(tmp_path), "learning_rate"))
    assert {name: getattr(config, name) for name in OWN} == OWN | {"optimizer": None}
    recorded = resolved(run(tmp_path / "out", max_train_steps=1), OWN)
    assert recorded == OWN | {"learning_rate": 1e-3}  # which the flags of these tests give


def test_the_published_recipe_differs_from_the_defaults_in_what_it_names_and_nothing_else(
    flags: Callable, tmp_path: Path
) -> None:
    plain = without(flags(tmp_path), "learning_rate")
    own, published = parse_train(plain).model_dump(), parse_train(plain, defaults=PUBLISHED).model_dump()
    assert {name: published[name] for name in own if own[name] != published[name]} == PUBLISHED


@pytest.mark.parametrize(("total", "asked", "expected"), [
    (4, None, 0), (400, None, 40), (20_000, None, 500), (1_000_000, None, 500), (400, 0, 0), (400, 7, 7),
    (400, 2000, 2000),
])  # fmt: skip
def test_warm_up_is_a_tenth_of_the_run_and_not_over_500_steps(total: int, asked: int | None, expected: int) -> None:
    assert warmup_steps(OptimConfig(lr_warmup_steps=asked), total) == expected


def test_the_rate_rises_to_its_peak_and_stays_there() -> None:
    config = OptimConfig(lr_warmup_steps=None, optimizer="adamw")
    schedule = make_schedule(make_optimizer(Adapter(torch.nn.Linear(1, 1), {}), config), config, 100)
    rates = []
    for _ in range(100):
        rates.append(schedule.get_last_lr()[0])
        schedule.optimizer.step()
        schedule.step()
    assert rates[0] == 0 and rates[5] == pytest.approx(1.5e-4)
    assert rates[10:] == [pytest.approx(3e-4)] * 90


def test_the_constant_schedule_alone_takes_no_warm_up() -> None:
    config = OptimConfig(lr_scheduler="constant", optimizer="adamw")
    schedule = make_schedule(make_optimizer(Adapter(torch.nn.Linear(1, 1), {}), config), config, 100)
    assert schedule.get_last_lr() == [3e-4]


def test_a_resumed_run_keeps_its_optimizer_unless_another_is_asked_for(
    run: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, max_train_steps=1, optimizer="adamw")
    run(tmp_path, max_train_steps=2, resume_from_checkpoint="latest")
    assert resolved(tmp_path, ["optimizer"]) == {"optimizer": "adamw"}
    with pytest.raises(Problem, match="optimizer was 'adamw', is 'muon'"):
        run(tmp_path, max_train_steps=3, resume_from_checkpoint="latest", optimizer="muon")


def test_a_run_from_before_there_was_a_choice_goes_on_by_adamw(flags: Callable, tmp_path: Path) -> None:
    point, runtime = StartingPoint(state={"config": {"learning_rate": 1e-4}}), SimpleNamespace(precision="no")
    config, _ = as_begun(parse_train(flags(tmp_path)), runtime, point)  # type: ignore[arg-type]
    assert config.optimizer == "adamw"
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({"adam_beta1": 0.9, "max_train_steps": 3}))
    assert parse_train([*flags(tmp_path), f"--config={file}"]).optimizer == "adamw"
