"""The requests of accelerate's launcher are done, told or refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from ip_adapter_trainer.config import parse_train
from ip_adapter_trainer.core.errors import Problem
from ip_adapter_trainer.runtime.launcher import demand_one_way, demand_same_accumulation, judge_alone

WAYS = ("DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG")


@pytest.mark.parametrize("way", WAYS)
def test_weights_shared_out_over_processes_are_refused(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{way}", "true")
    with pytest.raises(Problem, match="every process holds all weights"):
        demand_one_way()


def test_a_compiler_is_told_to_be_left_out(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    demand_one_way()
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    demand_one_way()
    assert "dynamo backend inductor is not used: --compile on" in capsys.readouterr().err


def test_the_launchers_micro_batches_are_those_of_a_run_that_sets_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    needed = ["--pretrained_model_name_or_path=base", "--family=sd", "--data_json_file=rows.json"]
    needed.append("--image_encoder_path=encoder")
    file = tmp_path / "settings.yaml"
    file.write_text("gradient_accumulation_steps: 2\n")
    assert parse_train(needed).gradient_accumulation_steps == 4
    for way in (["--gradient_accumulation_steps=2"], ["--config", str(file)]):
        with pytest.raises(Problem, match="the launcher asks for 4"):
            parse_train([*needed, *way])


def test_other_micro_batches_than_the_launchers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    demand_same_accumulation(2)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    demand_same_accumulation(4)
    with pytest.raises(Problem, match="2 micro batches a step are set, and the launcher asks for 4"):
        demand_same_accumulation(2)


@pytest.mark.parametrize(
    ("variables", "is_told"),
    [
        ({"MASTER_ADDR": "127.0.0.1", "ACCELERATE_MIXED_PRECISION": "no"}, True),
        ({"MASTER_ADDR": "127.0.0.1", "ACCELERATE_MIXED_PRECISION": "no", "WORLD_SIZE": "1"}, False),
        ({"ACCELERATE_MIXED_PRECISION": "no"}, False),
        ({"MASTER_ADDR": "127.0.0.1"}, False),
    ],
)
def test_processes_that_were_not_started_are_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], variables: dict[str, str], is_told: bool
) -> None:
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    judge_alone("cpu")
    assert ("add --multi_gpu" in capsys.readouterr().err) is is_told
