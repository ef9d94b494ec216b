"""Run every command once on each Python found: `make smoke`. What is not found is said; exit 1 if a command fails.

Each Python gets a virtual environment of its own in `.smoke`, by constraints.txt. Needs the standard library alone.
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

VERSIONS = ("3.11", "3.12", "3.13", "3.14")
ROOT = Path(__file__).resolve().parents[1]
HOME = ROOT / ".smoke"
HELPED = ("train", "prepare", "generate", "evaluate", "export", "inspect", "check", "pocket", "demo")


def interpreter(version: str) -> str | None:
    """Find a Python of this version on the path or among pyenv's; one that does not run is passed over."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = [shutil.which(f"python{version}"), *map(str, sorted(pyenv.glob(f"{version}.*/bin/python")))]
    for candidate in filter(None, found):
        asked = [candidate, "-c", "import sys, venv, ensurepip; print('%d.%d' % sys.version_info[:2])"]
        if subprocess.run(asked, capture_output=True, text=True).stdout.strip() == version:
            return candidate
    return None


def environment(python: str, folder: Path, log: Path) -> Path | None:
    """Make a virtual environment with the package in it unless it is there; None: it could not be installed."""
    stamp, needed = folder / ".installed", (ROOT / "pyproject.toml", ROOT / "constraints.txt")
    own = folder / "bin" / "python"
    if not stamp.exists() or any(file.stat().st_mtime > stamp.stat().st_mtime for file in needed):
        install = ["-m", "pip", "install", "--quiet", "--constraint", str(ROOT / "constraints.txt")]
        for command in (
            [python, "-m", "venv", "--clear", str(folder)],
            [str(own), "-m", "pip", "install", "--quiet", "--upgrade", "pip"],
            [str(own), *install, "--editable", str(ROOT)],
        ):
            if not succeeds(command, log):
                return None
        stamp.touch()
    return own


def commands(work: Path) -> dict[str, list[str]]:
    """Return what is run, in this order, by its name in the table."""
    pocket, run, adapter = work / "pocket", work / "run", work / "adapter.safetensors"
    models = ["--pretrained_model_name_or_path", f"{pocket}/base", "--image_encoder_path", f"{pocket}/image_encoder"]
    rows = ["--data_json_file", f"{pocket}/data.json", "--data_root_path", f"{pocket}/images"]
    steps = ["--resolution", "32", "--train_batch_size", "2", "--max_train_steps", "2", "--num_validation_images", "2"]
    scores = ["--num_rows", "2", "--num_images_per_prompt", "1", "--num_inference_steps", "2"]
    drawn = ["--num_inference_steps", "2", "-o", f"{work}/drawn.png"]
    return {
        "pocket": [str(pocket), "--rows", "8"],
        "check": rows,
        "prepare": [*models, *rows, "--resolution", "32", "--prepared_dir", f"{work}/prepared"],
        "train": [*models, *rows, *steps, "--grid_rows", "0", "--output_dir", str(run)],
        "export": [str(run), "-o", str(adapter)],
        "inspect": [str(adapter)],
        "generate": ["--adapter", str(adapter), "--image", f"{pocket}/images/00000.png", *drawn],
        "evaluate": [
            "--adapter",
            str(adapter),
            *rows,
            *scores,
            "--clip_model",
            f"{pocket}/clip",
            "-o",
            f"{work}/e.json",
        ],
    }


def succeeds(command: list[str], log: Path) -> bool:
    """Run a command with its output in the log; return whether it ended well."""
    with log.open("ab") as file:
        file.write(f"\n$ {' '.join(command)}\n".encode())
        file.flush()
        return subprocess.run(command, stdout=file, stderr=file, stdin=subprocess.DEVNULL, cwd=HOME).returncode == 0


def smoke(version: str) -> dict[str, str]:
    """Run all on one Python; return the table's row: seconds of each command (the longest help), or that it failed."""
    row, log = {"Python": version}, HOME / f"{version}.log"
    python = interpreter(version)
    if python is None:
        return row | {"torch": "not found"}
    log.unlink(missing_ok=True)
    began = time.monotonic()
    own = environment(python, HOME / version, log)
    if own is None:
        return row | {"torch": "FAILED to install"}
    asked = [str(own), "-c", "import platform, torch; print(platform.python_version(), torch.__version__)"]
    row["Python"], row["torch"] = subprocess.run(asked, capture_output=True, text=True).stdout.split() or (version, "?")
    row["install"] = f"{time.monotonic() - began:.0f}"
    work = HOME / f"{version}-work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    longest_s = dict[str, float]()
    for name, flags in (commands(work) | {f"{name} --help": ["--help"] for name in HELPED}).items():
        began = time.monotonic()
        done = succeeds([str(own), "-m", "ip_adapter_trainer", name.split()[0], *flags], log)
        column = "a --help" if flags == ["--help"] else name
        longest_s[column] = max(longest_s.get(column, 0.0), time.monotonic() - began if done else math.inf)
        print(f"{version}: {name} {'done' if done else f'FAILED, see {log}'}", flush=True)
    return row | {name: f"{s:.1f}" if math.isfinite(s) else "FAILED" for name, s in longest_s.items()}


def main() -> int:
    """Run all and print the table, seconds in it."""
    HOME.mkdir(exist_ok=True)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads that outnumber the free cores wait for each other
    rows = [smoke(version) for version in VERSIONS]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    table = [columns, ["---"] * len(columns), *([row.get(column, "") for column in columns] for row in rows)]
    print("\n".join(f"| {' | '.join(line)} |" for line in table))
    return int(any("FAILED" in cell for row in rows for cell in row.values()))


if __name__ == "__main__":
    sys.exit(main())
