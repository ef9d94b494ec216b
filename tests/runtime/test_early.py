"""A second start in one folder is refused before anything heavy is imported, and a first one never."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ip_adapter_trainer.core.errors import Problem
from ip_adapter_trainer.runtime.early import demand_free
from ip_adapter_trainer.storage.staging import lock

SCRIPT = Path(__file__).parents[2] / "examples" / "ip_adapter" / "tutorial_train_plus.py"


@pytest.fixture
def taken(tmp_path: Path) -> Iterator[Path]:
    """A folder that another run holds: locks of one process exclude each other too."""
    tmp_path.joinpath("run").mkdir()
    held = lock(tmp_path / "run")
    yield tmp_path / "run"
    held.release()


def _settings_file(taken: Path, text: str) -> str:
    file = taken.parent / "settings.yaml"
    file.write_text(text)
    return str(file)


@pytest.mark.parametrize(
    "spelled", ["--output_dir={}", "--output-dir={}", "--output_dir {}", "--seed 3 --output_dir {}"]
)
def test_a_taken_folder_is_refused_however_it_is_named(taken: Path, spelled: str) -> None:
    with pytest.raises(Problem, match="another run is writing this folder"):
        demand_free(spelled.format(taken).split(), "output_dir")


def test_a_settings_file_names_it_too_and_flags_have_the_last_word(taken: Path) -> None:
    file = _settings_file(taken, f"output_dir: {taken}\nseed: 3\n")
    with pytest.raises(Problem, match="another run"):
        demand_free(["--config", file], "output_dir")
    demand_free(["--config", file, "--output_dir", str(taken.parent)], "output_dir")


def test_the_default_folder_is_looked_at(taken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken.rename(taken.with_name("prepared"))
    monkeypatch.chdir(taken.parent)
    with pytest.raises(Problem, match="another run"):
        demand_free([], "prepared_dir")


@pytest.mark.parametrize("more", [["--dry_run"], ["--help"]])
def test_what_writes_nothing_is_let_in(taken: Path, more: list[str]) -> None:
    demand_free(["--output_dir", str(taken), *more], "output_dir")


def test_only_the_first_process_looks(taken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    demand_free(["--output_dir", str(taken)], "output_dir")


def test_nothing_is_made_or_held_by_looking(tmp_path: Path) -> None:
    demand_free(["--output_dir", str(tmp_path / "new")], "output_dir")
    assert not list(tmp_path.iterdir())
    lock(tmp_path).release()
    demand_free(["--output_dir", str(tmp_path)], "output_dir")
    lock(tmp_path).release()


def test_broken_flags_are_left_for_the_parser(tmp_path: Path) -> None:
    demand_free(["--output_dir"], "output_dir")


def test_a_claim_waits_for_one_that_only_looks(tmp_path: Path) -> None:
    looking = threading.Event()

    def look() -> None:
        held = lock(tmp_path)
        looking.set()
        time.sleep(0.03)
        held.release()

    looker = threading.Thread(target=look)
    looker.start()
    looking.wait()
    lock(tmp_path).release()
    looker.join()


@pytest.mark.parametrize("argv", [["-m", "ip_adapter_trainer", "train"], [str(SCRIPT)]])
def test_the_commands_look_before_they_import(taken: Path, argv: list[str]) -> None:
    command = [sys.executable, "-X", "importtime", *argv, "--output_dir", str(taken)]
    done = subprocess.run(command, env=dict(os.environ), capture_output=True, text=True)
    assert done.returncode == 2 and "another run is writing this folder" in done.stderr
    assert "filelock" in done.stderr and "torch" not in done.stderr


def test_prepare_looks_before_it_imports(taken: Path) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "ip_adapter_trainer", "prepare", "--prepared_dir", str(taken)]
    done = subprocess.run(command, env=dict(os.environ), capture_output=True, text=True)
    assert done.returncode == 2 and "another run is writing this folder" in done.stderr
    assert "torch" not in done.stderr
