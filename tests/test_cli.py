"""The command line's words before any command does its work, and its end in a pipe."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from ip_adapter_trainer import cli
from ip_adapter_trainer.config import RESOLVED, parse_train
from ip_adapter_trainer.core.errors import Problem
from ip_adapter_trainer.storage.staging import lock
from ip_adapter_trainer.train.help import GROUPS

SCRIPT = Path(__file__).parents[1] / "examples" / "ip_adapter" / "tutorial_train_plus.py"
HEAVY = ("torch", "numpy", "diffusers", "transformers", "PIL")
NEEDED = ["--pretrained_model_name_or_path=b", "--image_encoder_path=e", "--data_json_file=d.json"]


def said(argv: Sequence[str], **more: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ip_adapter_trainer", *argv]
    return subprocess.run(command, text=True, stderr=subprocess.PIPE, **{"stdout": subprocess.PIPE} | more)  # type: ignore[call-overload]


@pytest.mark.parametrize("flag", ["--version", "-V"])
def test_versions_are_told_without_what_they_are_of(flag: str) -> None:
    code = f"import sys; sys.argv[1:] = [{flag!r}]; from ip_adapter_trainer import cli\n"
    code += "try: cli.main()\nexcept SystemExit as left: print(left.code, 'torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.splitlines()
    assert [line.split()[0] for line in out[:-1]] == [
        "ip_adapter_trainer", "torch", "diffusers", "transformers", "accelerate", "python"
    ]  # fmt: skip
    assert out[-1] == "0 False" and all(line.split()[1][0].isdigit() for line in out[1:-1])


@pytest.mark.parametrize(("argv", "code"), [([], 2), (["help"], 0), (["--help"], 0), (["-h"], 0)])
def test_usage(argv: list[str], code: int) -> None:
    done = said(argv)
    assert (done.returncode, done.stdout) == (code, cli.usage() + "\n")


def test_the_help_of_no_command_imports_anything_heavy() -> None:
    code = f"""import sys, contextlib, io; from ip_adapter_trainer import cli
for name in cli.COMMANDS:
    for flag in ("--help", "--help-all"):
        with contextlib.redirect_stdout(io.StringIO()) as told, contextlib.suppress(SystemExit):
            cli.RUN[name]([flag])
        print(told.getvalue().split()[2] == name, sorted(set({HEAVY}) & sys.modules.keys()))"""
    began = time.monotonic()
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out == "True []\n" * 2 * len(cli.COMMANDS)
    assert time.monotonic() - began < 15, "generous on a busy machine; on a quiet one under 0.5 s each"


def told_by(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Return what a command prints before it ends."""
    with pytest.raises(SystemExit, match="0"):
        cli.RUN[argv[0]](argv[1:])
    return capsys.readouterr().out


def titles(text: str) -> list[str]:
    """Return the titles of a help's groups but the one that holds --help itself."""
    return re.findall(r"^\W*(\w[\w ]*) options\b", text, re.MULTILINE)


def test_the_help_of_train_shows_what_most_runs_need_and_all_where_asked(capsys: pytest.CaptureFixture[str]) -> None:
    short = told_by(["train", "--help"], capsys)
    assert titles(short) == ["Essential"] and 15 < len(re.findall(r"^\W+--\w", short, re.MULTILINE)) < 25
    assert "--config" in short and "--adam_beta1" not in short and "--help-all" in short
    for flag in ("--help-all", "--help_all"):
        whole = told_by(["train", "--variant", "plus", flag], capsys)
        assert titles(whole) == [*GROUPS, "Variant plus"]
        assert "--adam_beta1" in whole and "--resampler_dim" in whole


def test_the_examples_in_the_help_are_right(capsys: pytest.CaptureFixture[str]) -> None:
    text = told_by(["train", "--help"], capsys).replace("\\\n", "")
    first, second = (shlex.split(line)[2:] for line in text.splitlines() if line.startswith("  ip-adapter train"))
    config = parse_train([*first, "--family=sd"])
    assert config.output_dir == "run" and second[:2] == ["--config", f"run/{RESOLVED}"]
    assert parse_train([*first, "--family=sd", *second[2:]]).resume_from_checkpoint == "latest"


def test_help_of_a_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["ip-adapter", "help", "inspect"])
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    assert capsys.readouterr().out.startswith("usage: ip-adapter inspect")


@pytest.mark.parametrize("argv", [["trian"], ["help", "trian"]])
def test_an_unknown_command_gets_a_known_one(argv: list[str]) -> None:
    done = said(argv)
    assert done.returncode == 2 and "did you mean 'train'?" in done.stderr


@pytest.mark.parametrize("argv", [["--help"], ["check", "--help"]])
def test_a_reader_that_is_gone_ends_it_without_a_word(argv: list[str]) -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    done = said(argv, stdout=theirs)
    os.close(theirs)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize(("command", "flag"), [("train", "--output_dir"), ("prepare", "--prepared_dir")])
@pytest.mark.parametrize("name", ["file", "file/folder", "a" * 300])
def test_a_folder_that_cannot_be_is_refused_at_once(tmp_path: Path, command: str, flag: str, name: str) -> None:
    (tmp_path / "file").touch()
    told = "File name too long" if len(name) > 255 else "a file is where a folder is needed"
    refused_at_once(["-m", "ip_adapter_trainer", command], [flag, str(tmp_path / name)], told)


def refused_at_once(program: Sequence[str], flags: Sequence[str], told: str) -> None:
    """Assert that a command is refused before anything heavy is imported."""
    command = [sys.executable, "-X", "importtime", *program, *NEEDED, *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and told in done.stderr and "pydantic" in done.stderr
    assert not [line for line in done.stderr.splitlines() if line.split("|")[-1].strip() in HEAVY]


@pytest.fixture
def taken(tmp_path: Path) -> Iterator[Path]:
    """A folder that another run holds: locks of one process exclude each other too."""
    tmp_path.joinpath("run").mkdir()
    held = lock(tmp_path / "run")
    yield tmp_path / "run"
    held.release()


@pytest.mark.parametrize("program", [
    ["-m", "ip_adapter_trainer", "train", "--output_dir"], [str(SCRIPT), "--output_dir"],
    ["-m", "ip_adapter_trainer", "prepare", "--prepared_dir"],
])  # fmt: skip
def test_a_second_start_in_one_folder_is_refused_at_once(taken: Path, program: list[str]) -> None:
    *program, flag = program
    refused_at_once(program, [flag, str(taken)], "another run is writing this folder")


@pytest.mark.parametrize(
    "spelled", ["--output_dir={}", "--output-dir={}", "--output_dir {}", "--seed 3 --output_dir {}"]
)
def test_a_taken_folder_is_refused_however_it_is_named(
    taken: Path, spelled: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.guarded(cli.RUN["train"], [*NEEDED, *spelled.format(taken).split()]) == 2
    assert "another run is writing this folder" in capsys.readouterr().err


def test_a_settings_file_names_it_too_and_flags_have_the_last_word(taken: Path) -> None:
    file, asked = taken.parent / "settings.yaml", [*NEEDED, "--family=sd"]
    file.write_text(f"output_dir: {taken}\nseed: 3\n")
    with pytest.raises(Problem, match="another run"):
        parse_train([*asked, "--config", str(file)], look=cli.look)
    parse_train([*asked, "--config", str(file), "--output_dir", str(taken.parent)], look=cli.look)


def test_the_default_folder_is_looked_at(
    taken: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    taken.rename(taken.with_name("prepared"))
    monkeypatch.chdir(taken.parent)
    assert cli.guarded(cli.RUN["prepare"], NEEDED) == 2
    assert "another run" in capsys.readouterr().err


def test_what_writes_nothing_is_let_in(taken: Path) -> None:
    parse_train([*NEEDED, "--family=sd", "--output_dir", str(taken), "--dry_run"], look=cli.look)


def test_only_the_first_process_looks(taken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    cli.demand_free(str(taken), "--output_dir")


def test_nothing_is_made_or_held_by_looking(tmp_path: Path) -> None:
    cli.demand_free(str(tmp_path / "new"), "--output_dir")
    assert not list(tmp_path.iterdir())
    lock(tmp_path).release()
    cli.demand_free(str(tmp_path), "--output_dir")
    lock(tmp_path).release()


def test_paths_that_cannot_be_are_no_bugs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()

    def run(argv: Sequence[str]) -> int:
        (tmp_path / "file" / "folder").mkdir(parents=True)
        return 0

    assert cli.guarded(run, []) == 2
    assert f"where: {tmp_path / 'file'}" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_of_any_command_is_one_line(number: signal.Signals, capfd: pytest.CaptureFixture[str]) -> None:
    def run(argv: Sequence[str]) -> int:
        signal.raise_signal(number)
        return 0

    assert cli.guarded(run, []) == 128 + number
    assert capfd.readouterr().err == "stopped\n"
