"""What a training set costs before its first step, by its number of rows.

Each figure is of a fresh process that opens a generated manifest and does what training does with it up to the first
batch's indices: no picture is read. `opens` is reading and checking every row, `ready` all that follows until the
order's first step, `peak` the most memory the process ever held (with torch, which loading pictures imports; `torch`
is how much that is), `deep` the first step asked of epoch 3, `index` one (index, row) pair of the steps after it,
`replace` finding the rows that may stand in for one that cannot be read.

    python benchmarks/manifest_scale.py --rows 1000 100000 1000000
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

FORMS = ("json", "jsonl", "csv")
BATCH_IMAGES = 64
STEPS = 500
WORDS = "a the red blue old small cat dog boat portrait photo painting of on with under café street grass light".split()  # noqa: SIM905
COLUMNS = (
    ("form", "{form}"), ("rows", "{rows:,}"), ("opens s", "{opens_s:.2f}"), ("ready s", "{ready_s:.3f}"),
    ("peak MB", "{peak_mb:.0f}"), ("torch MB", "{torch_mb:.0f}"), ("deep ms", "{deep_ms:.1f}"),
    ("index us", "{index_us:.1f}"), ("replace us", "{replace_us:.0f}"),
)  # fmt: skip


def objects(rows: int) -> Iterator[dict[str, str]]:
    """Rows with names as of sharded sets and captions of about 60 characters."""
    chance = random.Random(0)
    for number in range(rows):
        caption = " ".join(chance.choices(WORDS, k=12))
        yield {"image_file": f"shard_{number // 1000:05d}/{number:09d}.jpg", "text": caption}


def write(path: Path, rows: int) -> None:
    """A manifest in the form of the path's suffix."""
    with path.open("w", encoding="utf-8", newline="") as file:
        if path.suffix == ".csv":
            table = csv.DictWriter(file, ["image_file", "text"])
            table.writeheader()
            table.writerows(objects(rows))
            return
        lines = path.suffix == ".jsonl"
        file.write("" if lines else "[")
        for number, row in enumerate(objects(rows)):
            file.write(("\n" if lines else ", ") * bool(number) + json.dumps(row, ensure_ascii=False))
        file.write("\n" if lines else "]")


def measure(path: Path) -> dict[str, float]:
    """Figures of this process, which must be a fresh one."""
    from ip_adapter_trainer.feed.bucketing import assign_buckets
    from ip_adapter_trainer.feed.config import DataConfig
    from ip_adapter_trainer.feed.dataset import TrainingSet
    from ip_adapter_trainer.feed.sampler import Sampler
    from ip_adapter_trainer.manifest.manifest import read_manifest

    torch_mb, began = _peak_mb(), time.monotonic()
    config = DataConfig(data_json_file=str(path))
    manifest = read_manifest(config)
    opened = time.monotonic()
    bucketing = assign_buckets(manifest, config)
    samples = TrainingSet(manifest, config, bucketing, seed=0, preprocess={"image": _no_image})
    order = Sampler(bucketing.bucket_of_row, seed=0, batch_images=BATCH_IMAGES)
    order.step(0)
    ready = time.monotonic()
    deep = order.steps_before(3)
    order.step(deep)
    reached = time.monotonic()
    for step in range(deep, deep + STEPS):
        order.step(step)
    stepped = time.monotonic()
    for row in range(0, len(samples), max(1, len(samples) // 100)):
        list(samples._candidates(row))
    replaced, asked = time.monotonic(), len(range(0, len(samples), max(1, len(samples) // 100)))
    return {
        "opens_s": opened - began,
        "ready_s": ready - opened,
        "peak_mb": _peak_mb(),
        "torch_mb": torch_mb,
        "deep_ms": 1e3 * (reached - ready),
        "index_us": 1e6 * (stepped - reached) / (STEPS * BATCH_IMAGES),
        "replace_us": 1e6 * (replaced - stepped) / asked,
    }


def _no_image(image: object) -> NoReturn:
    raise AssertionError("no picture is read here")


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Prints the table, or with --measure one process's figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10**3, 10**5, 10**6])
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.measure:
        print(json.dumps(measure(flags.measure)))
        return
    print(f"| {' | '.join(name for name, _ in COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    with tempfile.TemporaryDirectory() as folder:
        for rows in flags.rows:
            for form in FORMS:
                path = Path(folder) / f"data.{form}"
                write(path, rows)
                command = [sys.executable, __file__, "--measure", str(path)]
                told = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
                figures = {"form": form, "rows": rows} | json.loads(told)
                print(f"| {' | '.join(text.format(**figures) for _, text in COLUMNS)} |", flush=True)
                path.unlink()


if __name__ == "__main__":
    main()
