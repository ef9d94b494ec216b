"""The command line's words before any command does its work, and its end in a pipe."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from ip_adapter_trainer import cli


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
    code = f"from ip_adapter_trainer import cli; raise SystemExit(cli.guarded(cli.RUN[{command!r}], [{flag!r}, "
    code += f"{str(tmp_path / name)!r}]))"
    done = subprocess.run([sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True)
    told = "File name too long" if len(name) > 255 else "a file is where a folder is needed"
    assert done.returncode == 2 and told in done.stderr and "torch" not in done.stderr


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
