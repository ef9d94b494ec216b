"""Runs of every family and variant, byte for byte: `python -m tests.exact --work DIR --out F`, then `--compare A B`.

Bytes depend on the machine and its libraries, so nothing is kept here: record one state of the code, then another in
the same folder, and compare. `golden.json` holds what is the same on every machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from tests import tiny

COMMON = (
    "--resolution=32 --train_batch_size=2 --gradient_accumulation_steps=2 --max_train_steps=10 --save_steps=5 "
    "--report_to=none --learning_rate=1e-3 --num_validation_images=4 --validation_steps=5 --grid_rows=2 --grid_steps=3 "
    "--snr_gamma=5 --noise_offset=0.05 --random_flip --text_drop_rate=0.2 --image_drop_rate=0.3"
)
MORE = {  # by name: base, variant, further flags
    "sd1 plus bf16": ("sd1", "plus", "--mixed_precision=bf16"),
    "sdxl base bf16 buckets": ("sdxl", "base", "--mixed_precision=bf16 --aspect_ratio_buckets --bucket_step_px=8"),
    "sd1 plus prepared": ("sd1", "plus", "--prepare=auto --prepare_text"),
    "sdxl base prepared": ("sdxl", "base", "--prepare=auto"),
    "sdxl plus ema checkpointing": ("sdxl", "plus", "--use_ema --gradient_checkpointing --adapter_layers style"),
    "sd2v full int8": ("sd2v", "full", "--quantize=int8 --latents=mean --clip_skip=2"),
}


def digest(content: bytes) -> str:
    """Return a short hash."""
    return hashlib.sha256(content).hexdigest()[:16]


def of_tensors(tensors: dict[str, torch.Tensor]) -> str:
    """Return a hash over names, types and bytes."""
    parts = [f"{n} {t.dtype} {list(t.shape)}".encode() + t.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
             for n, t in sorted(tensors.items())]  # fmt: skip
    return digest(b"".join(parts))


def of_file(file: Path) -> str:
    """Return a hash of a .safetensors file's tensors and metadata, whose order in the header is left to chance."""
    with safe_open(file, "pt") as opened:
        metadata = json.dumps(opened.metadata(), sort_keys=True)
    return digest(f"{metadata}{of_tensors(load_file(file))}".encode())


def command(*argv: str | Path) -> None:
    """Run one of the program's commands, on one thread: sums over more are rounded otherwise."""
    line, alone = [sys.executable, "-m", "ip_adapter_trainer", *map(str, argv)], {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, capture_output=True, text=True, check=False, env=alone)
    assert done.returncode == 0, done.stderr


def prepare(work: Path) -> None:
    """Write models and rows, once for all states of the code."""
    if (work / "rows").exists():
        return
    from ip_adapter_trainer.pocket import write

    for kind in tiny.BASES:
        tiny.make_base(work / kind, kind)
    tiny.make_encoder(work / "encoder")
    write.write_pairs(work / "rows", write.training_pairs(0, 24))


def measure(work: Path, extra: list[str], name: str, kind: str, variant: str, flags: str) -> dict[str, Any]:
    """Train, export, and hash all that came of it."""
    run, file = work / "run" / name.replace(" ", "-"), work / "run" / f"{name.replace(' ', '-')}.safetensors"
    shutil.rmtree(run, ignore_errors=True)
    command(
        "train", f"--pretrained_model_name_or_path={work / kind}", f"--image_encoder_path={work / 'encoder'}",
        f"--data_json_file={work / 'rows' / 'data.json'}", f"--data_root_path={work / 'rows' / 'images'}",
        f"--output_dir={run}", f"--variant={variant}", *COMMON.split(), *flags.split(), *extra,
    )  # fmt: skip
    command("export", run, "--output", file, "--overwrite")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    weights = torch.load(run / "checkpoint-10" / "pytorch_model.bin", weights_only=True)
    grids = sorted((run / "grids").iterdir())
    return {
        "losses": [row["loss"] for row in rows if "lr" in row],
        "metrics": digest((run / "metrics.jsonl").read_bytes()),
        "grids": [digest(Image.open(grid).tobytes()) for grid in grids],
        "weights": of_tensors(weights),
        "state": of_tensors(load_file(run / "checkpoint-10" / "training_state.safetensors")),
        "export": of_file(file),
    }


def record(work: Path, out: Path, extra: list[str]) -> None:
    """Measure all runs, two at a time."""
    prepare(work)
    runs = {f"{kind} {variant}": (kind, variant, "") for kind in tiny.BASES for variant in ("base", "plus", "full")}
    measured = partial(measure, work, extra)
    with ThreadPoolExecutor(2) as pool:
        found = {name: pool.submit(measured, name, *run) for name, run in (runs | MORE).items()}
        out.write_text(json.dumps({name: one.result() for name, one in found.items()}, indent=1) + "\n")


def compare(first: Path, second: Path) -> int:
    """Print what differs; 1 if anything does."""
    one, other = (json.loads(file.read_text()) for file in (first, second))
    apart = [f"{run}: {name}" for run in one for name in one[run] if one[run][name] != other[run][name]]
    print("\n".join(apart) or f"{len(one)} runs, all the same")
    return bool(apart)


def main() -> int:
    """Record or compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, help="folder of models, rows and runs")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--compare", type=Path, nargs=2, help="two such files")
    options, extra = parser.parse_known_args()
    if options.compare:
        return compare(*options.compare)
    record(options.work, options.out, extra)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
