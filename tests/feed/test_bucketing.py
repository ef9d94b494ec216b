"""Buckets by the headers of the pictures."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from ip_adapter_trainer.core.errors import Fault
from ip_adapter_trainer.feed.bucketing import assign_buckets, scan_sizes
from ip_adapter_trainer.feed.config import DataConfig
from ip_adapter_trainer.manifest.manifest import read_manifest
from tests.manifest.rows import write_manifest, write_pictures


@pytest.mark.parametrize("workers", [0, 2])
def test_sizes_are_upright_and_faults_have_the_square(tmp_path: Path, workers: int) -> None:
    names = write_pictures(tmp_path, 3, sizes=((64, 64), (40, 64), (60, 40)))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (64, 40)).save(tmp_path / "turned.jpg", exif=exif)
    (tmp_path / "broken.png").write_bytes(b"GIF8")
    manifest_file = write_manifest(tmp_path, [*names, "turned.jpg", "broken.png", "none.png"])
    config = DataConfig(
        data_json_file=str(manifest_file), aspect_ratio_buckets=True, resolution=64, bucket_step_px=8,
        dataloader_num_workers=workers,
    )  # fmt: skip
    manifest = read_manifest(config)
    sizes = scan_sizes(manifest, config)
    assert sizes[:4] == [(64, 64), (40, 64), (60, 40), (64, 40)] and all(isinstance(s, Fault) for s in sizes[4:])
    bucketing = assign_buckets(manifest, config)
    assert [bucketing.size_px(row) for row in (0, 4, 5)] == [(64, 64)] * 3
    assert bucketing.size_px(1) == (48, 80) and bucketing.size_px(3) == (80, 48) == bucketing.size_px(2)
    assert [(f.kind, f.where) for f in bucketing.faults] == [
        ("damaged", "data.json, element 5 (broken.png)"), ("missing_file", "data.json, element 6 (none.png)")
    ]  # fmt: skip


def test_without_buckets_no_picture_is_opened(tmp_path: Path) -> None:
    config = DataConfig(data_json_file=str(write_manifest(tmp_path, ["none.png", "nor this.png"])))
    bucketing = assign_buckets(read_manifest(config), config)
    assert (
        bucketing.buckets.sizes_px == ((512, 512),)
        and bucketing.bucket_of_row.tolist() == [0, 0]
        and not bucketing.faults
    )
