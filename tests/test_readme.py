"""Command lines of README and docs: every line is parsed, README's own commands run as they stand."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from ip_adapter_trainer.cli import COMMANDS, RUN
from ip_adapter_trainer.config import compose, parse
from ip_adapter_trainer.core.errors import Problem
from ip_adapter_trainer.core.settings import Part
from ip_adapter_trainer.evaluate.config import EvaluateConfig, GenerateConfig
from ip_adapter_trainer.file_config import ExportConfig, InspectConfig
from ip_adapter_trainer.pocket import write
from ip_adapter_trainer.pocket.config import DemoConfig, PocketConfig
from ip_adapter_trainer.prepare.check_config import CheckConfig
from ip_adapter_trainer.prepare.config import PrepareConfig

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "examples" / "ip_adapter" / "README.md"]

# What README's commands are given in place of models to download and hours to wait, each of which must stand there.
REPLACED = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "pocket/base",
    "h94/IP-Adapter/models/image_encoder": "pocket/image_encoder",
    '"h94/IP-Adapter", subfolder="models/image_encoder"': '"pocket/image_encoder"',
    "--resolution 512": "--resolution 32",
    "--max_train_steps 20000": "--max_train_steps 2 --num_validation_images 2 --grid_rows 0",
    "--max_train_steps 200 ": "--max_train_steps 2 --num_validation_images 2 --grid_rows 0 ",
    "--train_batch_size 32": "--train_batch_size 2",
    "ip-adapter pocket pocket": "ip-adapter pocket pocket --rows 24",
    "ip-adapter generate": "ip-adapter generate --num_inference_steps 2",
    "num_inference_steps=30": "num_inference_steps=2",
}
KINDS: dict[str, type[Part]] = {
    "prepare": PrepareConfig, "generate": GenerateConfig, "evaluate": EvaluateConfig, "export": ExportConfig,
    "inspect": InspectConfig, "check": CheckConfig, "pocket": PocketConfig, "demo": DemoConfig,
}  # fmt: skip
POSITIONAL = {"source", "path", "folder"}
SCRIPTS = ("ip-adapter ", "-m ip_adapter_trainer ", "tutorial_train")


def blocks(text: str) -> list[str]:
    """The indented blocks of a page, without their indentation."""
    found = re.findall(r"(?:^    .*\n(?:\s*\n(?=    ))?)+", text, re.MULTILINE)
    return ["".join(line.removeprefix("    ") for line in block.splitlines(keepends=True)) for block in found]


def commands(text: str) -> list[str]:
    """Lines of blocks and code within lines that name this program, continued lines put together."""
    lines = [line.strip() for block in blocks(text) for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`([^`\n]+)`", text)
    return [line for line in lines if any(script in line for script in SCRIPTS)]


def argv_of(line: str) -> tuple[str, list[str]] | None:
    """A command and its flags; None where a line names the program alone, or a command without flags."""
    line = re.split(r"ip-adapter (?=[a-z])|-m ip_adapter_trainer |(?=tutorial_train)", line)[-1]
    line = line.split("' ")[0]  # a line that a script hands to another shell ends there
    words = [word for word in shlex.split(line, comments=True) if word not in ("...", "\\")]
    command, *flags = words or [""]
    if command.startswith("tutorial_train"):
        command = "train"
    return (command, flags) if command in COMMANDS and flags and "--help" not in flags else None


def every_line() -> Iterator[tuple[str, str]]:
    """Every line of a page that tells a command and flags of it, with the page's name."""
    for page in PAGES:
        yield from ((str(page.relative_to(ROOT)), line) for line in commands(page.read_text()) if argv_of(line))


def settled(command: str, flags: list[str]) -> Part:
    """Parse the flags of a line; those that it cannot do without are added where it leaves them out."""
    if "--config" in flags:  # a file of flags, not one of them
        flags = [*flags[: (at := flags.index("--config"))], *flags[at + 2 :]]
    variant = flags[flags.index("--variant") + 1] if "--variant" in flags else "base"
    kind = compose(variant, "sd") if command == "train" else KINDS[command]
    given = {"output" if flag == "-o" else flag.split("=")[0].lstrip("-") for flag in flags} | POSITIONAL
    left_out = [name for name, info in kind.model_fields.items() if info.is_required() and name not in given]
    return parse(kind, [*flags, *(f"--{name}=x" for name in left_out)], prog=command)


@pytest.mark.parametrize(("page", "line"), sorted(set(every_line())))
def test_every_command_line_of_the_docs_has_flags_that_exist(page: str, line: str) -> None:
    command, flags = argv_of(line) or ("", [])
    settled(command, flags)


def test_a_wrong_flag_or_value_would_be_found() -> None:
    for wrong in (["--resolution_px", "512"], ["--resolution", "many"], ["--variant", "plus", "--mean", "1"]):
        with pytest.raises((SystemExit, Problem)):
            settled("train", wrong)


def test_make_targets_that_readme_names_are_there() -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = {name for page in PAGES for name in re.findall(r"(?:`|    )make ([a-z-]+)", page.read_text())}
    assert {"demo", "test", "faults"} <= named <= set(targets)


def test_what_readme_shows_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = README
    for shown, given in REPLACED.items():
        assert shown in text, f"README no longer shows {shown}"
        text = text.replace(shown, given)
    write.write_pocket(Path("pocket"), rows=24, seed=0)
    for name in ("data.json", "images"):
        Path(name).symlink_to(Path("pocket") / name)
    Image.open(next(Path("images").glob("*.png"))).save("photo.jpg")
    shell = [b for b in blocks(text) if "ip-adapter train" in b]
    assert len(shell) == 2
    for line in (line for block in shell for line in block.replace("\\\n", " ").splitlines()):
        command, flags = argv_of(line) or ("", [])
        assert line.startswith("pip install") or RUN[command](flags) == 0, line
    (code,) = (block for block in blocks(text) if "import " in block)
    exec(compile(code, "README.md", "exec"), {})
    for drawn in ("out.png", "on-a-beach.png"):
        assert Image.open(drawn).size == (32, 32)
