"""How fast one core feeds rows: pictures decoded and preprocessed, beside a prepared set; and by the size of the set.

    python -m benchmarks.data_rate

SD1.5 shapes: moments [8, 64, 64] and image_embeds [1024], both bf16; pictures are 1024x768 JPEGs, cut to 512 px. The
large sets have sparse files, so their values take no disk; rows are asked for in random order. All is
time of the processor, which other programs stretch less than the clock's.
"""

from __future__ import annotations

import json
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.pictures import clip_preprocess, write_pictures
from ip_adapter_trainer.cache.index import IMAGES, Record, name_key
from ip_adapter_trainer.cache.prepared import Asked, PreparedSet
from ip_adapter_trainer.cache.shards import TableKind, TableWriter, checksums_of
from ip_adapter_trainer.cache.spec import CacheSpec
from ip_adapter_trainer.core.values import Need, Row
from ip_adapter_trainer.feed.bucketing import assign_buckets
from ip_adapter_trainer.feed.config import DataConfig
from ip_adapter_trainer.feed.dataset import TrainingSet
from ip_adapter_trainer.images.buckets import Buckets
from ip_adapter_trainer.manifest.images import ImageFiles
from ip_adapter_trainer.manifest.manifest import read_manifest
from ip_adapter_trainer.storage.digests import KEY, digest

MOMENTS = TableKind("moments", (8, 64, 64), torch.bfloat16)
EMBEDS = TableKind("image_embeds", (1024,), torch.bfloat16)
SIZE_PX = (512, 512)
NEED = Need("image", "image_embeds")
SPEC = CacheSpec(
    Buckets.square(512), (255, 255, 255), False, False, "vae", {"image": "clip"}, {SIZE_PX: MOMENTS}, {NEED: EMBEDS}
)
IMAGES_ON_DISK, SHARD_ROWS, BATCH, ASKED = 64, 4096, 16, 1000


def write_set(folder: Path, config: DataConfig) -> PreparedSet:
    """A prepared set of the rows with values out of the air."""
    pictures = ImageFiles.of(Path(config.data_json_file).parent, config)
    writers = {kind: TableWriter(folder, kind) for kind in (IMAGES, MOMENTS, EMBEDS)}
    for number in range(IMAGES_ON_DISK):
        content, status = pictures.read_file(f"{number}.jpg")
        record = Record.of(status, (768, 1024), digest(content))
        writers[IMAGES].add(name_key(f"{number}.jpg"), record.packed())
        for view in SPEC.views(record.content, record.size_px, 3):
            writers[view.kind].add(view.key, torch.randn(view.kind.shape).to(view.kind.dtype))
    for writer in writers.values():
        writer.seal()
    return PreparedSet(folder, SPEC, pictures)


def rate(samples: TrainingSet, batches: int) -> float:
    """Rows a second of one core's time, as batches, second pass over the rows: from the page cache."""
    samples.batch([(index, index % IMAGES_ON_DISK) for index in range(BATCH)])
    began = time.process_time()
    for batch in range(batches):
        samples.batch([(batch * BATCH + i, i * 7 % IMAGES_ON_DISK) for i in range(BATCH)])
    return batches * BATCH / (time.process_time() - began)


def sparse_table(root: Path, kind: TableKind, rows: int, key_of: Callable[[int], bytes]) -> None:
    """A table whose keys are written and whose values are holes."""
    folder = root / kind.folder
    folder.mkdir(parents=True)
    for start in range(0, rows, SHARD_ROWS):
        count = min(SHARD_ROWS, rows - start)
        addresses = b"".join(key_of(number) for number in range(start, start + count))
        keys, sums, end = count * 16, count * 24, count * kind.row_bytes
        header = {
            "key": {"dtype": "U8", "shape": [count, 16], "data_offsets": [0, keys]},
            "sum": {"dtype": "U8", "shape": [count, 8], "data_offsets": [keys, sums]},
            "value": {"dtype": "BF16", "shape": [count, *kind.shape], "data_offsets": [sums, end]},
        }
        text = json.dumps(header).encode()
        with (folder / f"{start:08d}.safetensors").open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.write(addresses)
            file.write(checksums_of(np.frombuffer(addresses, KEY), np.zeros((count, 8), np.uint8)).tobytes())
            file.truncate(8 + len(text) + end)


def write_sparse(root: Path, rows: int) -> None:
    """A set of any number of rows."""
    writer = TableWriter(root, IMAGES)
    for number in range(rows):
        writer.add(name_key(f"{number}.jpg"), Record(1, 1, 1, (768, 1024), digest(number)).packed())
    writer.seal()
    sparse_table(root, MOMENTS, rows, lambda number: SPEC.targets[SIZE_PX, False].keys(digest(number)))
    sparse_table(root, EMBEDS, rows, lambda number: SPEC.prompts[NEED, False].keys(digest(number)))


def each_us(prepared: PreparedSet, asked: list[int]) -> float:
    """Microseconds a row, asked for in batches."""
    began = time.process_time()
    for start in range(0, len(asked), BATCH):
        rows = [Asked(Row(f"{number}.jpg", ""), mirrored=False, text="") for number in asked[start : start + BATCH]]
        encoded = prepared.room(len(rows), SIZE_PX)
        prepared.read(rows, SIZE_PX, encoded, range(len(rows)))
    return (time.process_time() - began) / len(asked) * 1e6


def by_size(rows: int, config: DataConfig) -> tuple[float, float, float, float, float]:
    """Seconds to open and to check that all rows are there, microseconds a row twice, MB of memory at the most."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        write_sparse(root, rows)
        began = time.process_time()
        prepared = PreparedSet(root, SPEC, ImageFiles.of(root, config))
        opened = time.process_time()
        lacking = list(prepared.lacking([Row(f"{number}.jpg", "") for number in range(rows)], range(rows)))
        checked = time.process_time()
        assert not lacking
        asked = np.random.default_rng(1).permutation(rows)[:ASKED].tolist()
        first, again = each_us(prepared, asked), each_us(prepared, asked)
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return opened - began, checked - opened, first, again, peak_mb


def rates(rounds: int, scratch: Path | None = None) -> list[tuple[float, float]]:
    """Rows a second of one core's time, from pictures and from a prepared set, by turns; files go into `scratch`."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=scratch) as name:
        folder = Path(name)
        config = DataConfig(data_json_file=str(write_pictures(folder, SIZE_PX[0], IMAGES_ON_DISK)))
        manifest = read_manifest(config)
        preprocess, bucketing = clip_preprocess(224), assign_buckets(manifest, config)
        raw = TrainingSet(manifest, config, bucketing, seed=0, preprocess=preprocess)
        prepared = write_set(folder / "set", config)
        encoded = TrainingSet(manifest, config, bucketing, seed=0, preprocess=preprocess, prepared=prepared)
        return [(rate(raw, 4), rate(encoded, 200)) for _ in range(rounds)]


def main() -> None:
    """Prints both tables."""
    found = rates(3)
    print("| rows/s on one core | pictures | prepared set |\n|---|---|---|")
    for slow, fast in found:
        print(f"| {fast / slow:,.0f}x | {slow:.0f} | {fast:,.0f} |")
    print("\n| rows in the set | open, s | check all rows, s | a row, us | again, us | peak, MB |")
    print("|---|---|---|---|---|---|")
    for rows in (10**3, 10**5, 10**6):
        opened, checked, first, again, peak = by_size(rows, DataConfig(data_json_file="none"))
        print(f"| {rows:,} | {opened:.2f} | {checked:.2f} | {first:.0f} | {again:.0f} | {peak:.0f} |")


if __name__ == "__main__":
    main()
