"""The check names every fault, counts by kind, and ends with a verdict and an exit code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ip_adapter_trainer.prepare.check import CheckReport
from ip_adapter_trainer.prepare.check import check_rows as check
from ip_adapter_trainer.prepare.check_config import RowsCheckConfig as CheckConfig
from tests.manifest.rows import write_manifest, write_pictures


def _check(manifest: Path, **settings: Any) -> CheckReport:
    return check(CheckConfig(data_json_file=str(manifest), **settings))


def test_a_clean_set(tmp_path: Path) -> None:
    report = _check(write_manifest(tmp_path, write_pictures(tmp_path, 4, sizes=((32, 48), (64, 64)))))
    assert report.exit_code == 0 and not report.faults and report.sizes_px == [(32, 48), (64, 64)] * 2
    assert {shape: count for shape, count in report.by_shape.items() if count} == {"1:1": 2, "3:2 to 2:1": 2}
    assert str(report).endswith("clean: 4 rows, all read") and "32 px at least, 48 in the middle, 64 at most" in str(
        report
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_faults_notes_and_unread_columns_are_told(tmp_path: Path, workers: int) -> None:
    names = write_pictures(tmp_path, 2)
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    (tmp_path / "torn.png").write_bytes((tmp_path / names[0]).read_bytes()[:60])
    manifest = write_manifest(
        tmp_path, [*names, "moving.gif", "torn.png", "none.png", "../out.png"],
        prompt_image_file=[None, "torn.png", None, None, None, None], width=[1] * 6,
    )  # fmt: skip
    report = _check(manifest, max_fault_rate=0.5, show_faults=2, dataloader_num_workers=workers)
    assert [f.kind for f in report.faults] == ["unsafe_path", "truncated", "truncated", "missing_file"]
    assert report.faulty_rows == 4 and report.exit_code == 3
    assert "prompt image: " in report.faults[1].what and report.by_note == {"several_frames": 1}
    text = str(report)
    assert text.splitlines()[0].split() == ["unsafe_path", *str(report.faults[0]).split()]
    assert "and 2 more" in text and "               2  truncated" in text and "several_frames" in text
    assert "columns that nothing reads: width" in text
    assert text.endswith("too many faults: 4 of 6 rows are faulty, over the limit of 50.00%; training would stop")


def test_a_few_faults_are_usable(tmp_path: Path) -> None:
    report = _check(write_manifest(tmp_path, [*write_pictures(tmp_path, 4), "none.png"]), max_fault_rate=0.2)
    assert report.exit_code == 0 and str(report).splitlines()[-1].startswith("usable: 1 of 5 rows are faulty")


def test_no_setting_is_listed_that_is_not_read(tmp_path: Path) -> None:
    read = set[str]()

    class Noted(CheckConfig):
        def __getattribute__(self, name: str) -> Any:
            read.add(name)
            return super().__getattribute__(name)

    forms = (write_manifest(tmp_path, [*write_pictures(tmp_path, 4), "none.png"]), tmp_path)
    how: dict[str, Any] = {"aspect_ratio_buckets": True, "max_fault_rate": 1, "missing_captions": "empty"}
    asked = [Noted(data_json_file=str(form), **how) for form in forms]
    read.clear()  # of what its own rules read
    assert all(str(check(config)) for config in asked)
    assert not CheckConfig.model_fields.keys() - read


def test_no_sound_row_at_all(tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text(json.dumps([{"image_file": 1, "text": ""}]))
    report = _check(tmp_path / "data.json", max_fault_rate=1.0)
    assert report.exit_code == 3 and "shorter side" not in str(report)


def test_what_was_noticed_in_a_folder_is_in_the_report(tmp_path: Path) -> None:
    for name in write_pictures(tmp_path, 2):
        (tmp_path / name).with_suffix(".txt").write_text("")
    (tmp_path / "c.psd").touch()
    text = str(_check(tmp_path))
    assert f"noticed in the folder\n{1:>16}  .psd files, not read: c.psd\n" in text and text.endswith("noticed")


def test_pictures_that_training_enlarges_are_counted_where_a_resolution_is_given(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path, write_pictures(tmp_path, 3, sizes=((32, 48), (40, 40), (64, 40))))
    assert "enlarged" not in str(_check(manifest))
    assert "1 of 3 pictures have a side under 40 px and are enlarged" in str(_check(manifest, resolution=40))
