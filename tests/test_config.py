"""Settings from flags and files: names of earlier versions, names that are gone, names of other commands."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from ip_adapter_trainer.config import parse, parse_train
from ip_adapter_trainer.core.errors import Problem
from ip_adapter_trainer.core.settings import Part
from ip_adapter_trainer.evaluate.config import EvaluateConfig
from ip_adapter_trainer.prepare.check_config import CheckConfig

NEEDED = [
    "--pretrained_model_name_or_path=b", "--image_encoder_path=e", "--data_json_file=d.json", "--family=sd"
]  # fmt: skip


def test_a_file_of_an_earlier_version_keeps_its_meaning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "config.yaml"
    old = {"alpha_ground": "black", "max_picture_megapixels": 7, "lean_attention": True, "checkpointing_steps": 9}
    file.write_text(yaml.safe_dump(old | {"mixed_precision": None}))
    config = parse_train([*NEEDED, f"--config={file}", "--checkpointing_steps=3"])
    assert (config.alpha_background, config.max_image_megapixels, config.save_steps) == ("black", 7, 3)
    assert config.mixed_precision == "no"
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"lean_attention in {file} is passed over")


def test_what_is_accepted_to_differ_may_have_an_earlier_name() -> None:
    config = parse_train([*NEEDED, "--accept_changed", "alpha_ground", "seed", "rows"])
    assert config.accept_changed == ("alpha_background", "seed", "rows")


@pytest.mark.parametrize("flag", ["--lean_attention", "--no_lean_attention", "--no-lean-attention=True"])
def test_a_flag_that_is_gone_is_refused_with_what_to_do(flag: str) -> None:
    with pytest.raises(Problem, match="leave it out: it made no measurable difference") as caught:
        parse_train([*NEEDED, flag])
    assert caught.value.fault.where == flag.split("=")[0]


@pytest.mark.parametrize("look", [None, lambda config: None], ids=["at once", "with a look"])
@pytest.mark.parametrize("text", ["data_json_fil: d.json\n", "otherness: 3\n"])
def test_an_unknown_name_in_a_file_is_told_before_what_is_missing(tmp_path: Path, text: str, look: object) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(Problem, match=f"unknown setting '{text.split(':')[0]}'") as caught:
        parse_train(["--config", str(file)], look=look)  # type: ignore[arg-type]
    assert caught.value.fault.where == str(file)


def test_a_mistyped_flag_ends_the_program_before_the_base_model_is_looked_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse_train([*NEEDED[:3], "--learnin_rate=1e-3"], look=lambda config: None)
    assert "--learning_rate" in capsys.readouterr().err


@pytest.mark.parametrize(("kind", "own", "foreign"), [
    (CheckConfig, ["--resolution=64", "--caption_column=text"], ["--train_batch_size=2", "--no-center_crop"]),
    (CheckConfig, ["--dataloader-num-workers=2"], ["--checkpointing_steps=9"]),
    (EvaluateConfig, ["--adapter=a", "--scale=0.5"], ["--text_drop_rate=0.1"]),
])  # fmt: skip
def test_settings_of_training_that_another_command_does_not_read_are_named(
    kind: type[Part], own: list[str], foreign: list[str]
) -> None:
    own = ["--data_json_file=d.json", *own]
    with pytest.raises(Problem, match=r"does not read these settings of training[^$]*leave") as caught:
        parse(kind, [*own, *foreign], prog="it")
    assert caught.value.fault.where.split() == [flag.split("=")[0] for flag in foreign]
    assert parse(kind, own, prog="it")
