"""Folders as people keep them, and the lists that other trainers write: all is read, or counted and named."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from ip_adapter_trainer.core.errors import DataProblem, Problem
from ip_adapter_trainer.core.values import Row
from ip_adapter_trainer.manifest.config import ReadConfig
from ip_adapter_trainer.manifest.manifest import Manifest, read_manifest, usable_manifest


def _read(path: Path, **settings: Any) -> Manifest:
    return read_manifest(ReadConfig(data_json_file=str(path), **settings))


def _lay(folder: Path, *names: str) -> Path:
    """Files that hold their own name."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def _noticed(manifest: Manifest) -> dict[str, list[str]]:
    """Return notices by the beginning of their kind."""
    return {re.split(" file|,| beside| with| that| in| not", kind)[0]: n for kind, n in manifest.noticed.first.items()}


def test_what_a_folder_passes_over_is_counted_and_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    _lay(tmp_path, "a.jfif", "a.txt", "b.avif", "b.TXT", "c.psd", "c.txt", "sub/d.nef", "e.txt", "sub/f.caption")
    _lay(tmp_path, *(f"{n}.mp4" for n in range(5)), ".hidden.svg", ".hid/g.svg", "h.png.txt", "notes.md", "rows.csv")
    manifest = _read(tmp_path)
    assert list(manifest.rows) == [Row("a.jfif", "a.txt"), Row("b.avif", "b.TXT")] and not manifest.faults
    assert _noticed(manifest) == {
        ".mp4": ["0.mp4", "1.mp4", "2.mp4"], ".psd": ["c.psd"], ".nef": ["sub/d.nef"],
        "captions": ["e.txt", "h.png.txt", "sub/f.caption"], "lists": ["rows.csv"],
    }  # fmt: skip
    assert manifest.noticed.counts[".mp4 files, not read"] == 5
    usable_manifest(ReadConfig(data_json_file=str(tmp_path)))
    (line,) = capfd.readouterr().err.splitlines()
    assert ".mp4 files, not read: 5; .psd files, not read: 1; " in line and "ip-adapter check" in line


def test_pictures_of_one_stem_share_the_caption_and_are_noticed(tmp_path: Path) -> None:
    manifest = _read(_lay(tmp_path, "a.jpg", "a.png", "a.txt"))
    assert list(manifest.rows) == [Row("a.jpg", "a.txt"), Row("a.png", "a.txt")]
    assert _noticed(manifest) == {"pictures": ["a.png"]}


def test_linked_folders_are_followed_by_flag_only_and_none_is_read_twice(tmp_path: Path) -> None:
    inside = _lay(tmp_path / "data", "a.png", "a.txt", "sub/b.png", "sub/b.txt")
    outside = _lay(tmp_path / "more", "c.png", "c.txt")
    for name, target in {"l1": outside, "l2": outside, "l3": inside, "l4": tmp_path, "sub/l5": inside / "sub"}.items():
        (inside / name).symlink_to(target)
    manifest = _read(inside)
    assert [row.image_file for row in manifest.rows] == ["a.png", "sub/b.png"]
    assert list(manifest.noticed.counts.values()) == [5] and "--allow_outside_root" in manifest.noticed.in_short()
    manifest = _read(inside, allow_outside_root=True)
    assert [row.image_file for row in manifest.rows] == ["a.png", "l1/c.png", "sub/b.png"]
    assert list(manifest.noticed.counts.values()) == [4]


@pytest.mark.parametrize("extension", [".caption", "caption", ".Caption"])
def test_captions_of_another_extension(extension: str, tmp_path: Path) -> None:
    _lay(tmp_path, "a.png", "a.caption", "a.txt")
    assert _read(tmp_path, caption_extension=extension).rows[0].text == "a.caption"
    assert list(_read(tmp_path).noticed.counts) == [
        ".caption files beside pictures, not read (--caption_extension .caption takes them as captions)"
    ]


@pytest.mark.parametrize(
    ("more", "way", "obeyed"),
    [(["a.caption"], "--caption_extension .caption", {"caption_extension": ".caption"}),
     ([], "--missing_captions empty", {"missing_captions": "empty"})],
)  # fmt: skip
def test_no_captions_at_all_is_one_problem_whose_remedies_work(
    more: list[str], way: str, obeyed: dict[str, str], tmp_path: Path
) -> None:
    _lay(tmp_path, "a.png", "b.png", *more)
    with pytest.raises(DataProblem, match="none of 2 pictures has a caption") as caught:
        _read(tmp_path)
    assert way in caught.value.fault.remedy
    assert "a.png" in [row.image_file for row in _read(tmp_path, **obeyed).rows]


def test_missing_captions_may_be_empty_and_are_counted(tmp_path: Path) -> None:
    _lay(tmp_path, "a.png", "a.txt", "b.png", "c.png")
    assert [fault.kind for fault in _read(tmp_path).faults] == ["missing_caption"] * 2
    manifest = _read(tmp_path, missing_captions="empty")
    assert [row.text for row in manifest.rows] == ["a.txt", "", ""] and _noticed(manifest) == {
        "pictures": ["b.png", "c.png"]
    }


@pytest.mark.parametrize("test", ["validation", "val", "test", "dev"])
def test_of_splits_the_training_one_is_read_and_the_others_are_named(test: str, tmp_path: Path) -> None:
    _lay(tmp_path, "train/0/a.png", "train/0/a.txt", f"{test}/b.png", f"{test}/b.txt", "loose.png", "extra/c.png")
    manifest = _read(tmp_path)
    assert list(manifest.rows) == [Row("0/a.png", "train/0/a.txt")] and manifest.root == (tmp_path / "train").resolve()
    assert _noticed(manifest) == {"splits": [test], "folders and pictures": ["extra", "loose.png"]}
    assert f"--validation_data {tmp_path / test}" in manifest.noticed.in_short()


def test_a_folder_called_train_alone_is_a_folder_as_any_other(tmp_path: Path) -> None:
    _lay(tmp_path, "train/a.png", "train/a.txt", "plane/b.png", "plane/b.txt")
    assert [row.image_file for row in _read(tmp_path).rows] == ["plane/b.png", "train/a.png"]


CSV = "file_name,text\na.png,one\nsub/b.png,two\n"
JSONL = '{"file_name": "a.png", "text": "one"}\n{"file_name": "sub/b.png", "text": "two"}\n'


@pytest.mark.parametrize("place", [".", "train"])
@pytest.mark.parametrize(("name", "content"), [("metadata.csv", CSV), ("metadata.jsonl", JSONL)])
def test_the_metadata_of_a_folder_or_of_its_training_split(name: str, content: str, place: str, tmp_path: Path) -> None:
    _lay(tmp_path, f"{place}/a.png", f"{place}/sub/b.png")
    (tmp_path / place / name).write_text(content)
    for path in (tmp_path, tmp_path / place / name):
        manifest = _read(path)
        assert list(manifest.rows) == [Row("a.png", "one"), Row("sub/b.png", "two")]
        assert manifest.root == (tmp_path / place).resolve() and manifest.where(0) == (
            f"{name}, line {2 if name.endswith('csv') else 1} (a.png)"
        )


def test_metadata_of_two_forms_is_refused_and_either_may_be_named(tmp_path: Path) -> None:
    (tmp_path / "metadata.csv").write_text(CSV)
    (tmp_path / "metadata.jsonl").write_text(JSONL)
    with pytest.raises(Problem, match=r"metadata\.csv") as caught:
        _read(tmp_path)
    assert len(_read(Path(caught.value.fault.remedy.split()[-1])).rows) == 2


@pytest.mark.parametrize("other", ["caption", "prompt"])
def test_a_caption_column_of_another_name_is_named_in_the_remedy(other: str, tmp_path: Path) -> None:
    (tmp_path / "metadata.csv").write_text(CSV.replace("text", other))
    with pytest.raises(Problem) as caught:
        _read(tmp_path)
    assert caught.value.fault.remedy.endswith(f"--text_column {other}")
    assert [row.text for row in _read(tmp_path, text_column=other).rows] == ["one", "two"]


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
@pytest.mark.parametrize("mark", [";", "\t", ","])
def test_the_delimiter_is_known_by_the_header(mark: str, suffix: str, tmp_path: Path) -> None:
    text = "red, blue" if mark != "," else '"red, blue"'
    path = tmp_path / f"data{suffix}"
    path.write_text(f"id{mark}image_file{mark}text\n1{mark}a.png{mark}{text}\n2{mark}b.png{mark}a{mark}b\n")
    manifest = _read(path)
    assert list(manifest.rows) == [Row("a.png", "red, blue")] and manifest.unread_columns == ("id",)
    assert "4 cells" in manifest.faults[0].what
    assert {";": "semicolons", "\t": "tabs", ",": "commas"}[mark] in manifest.faults[0].remedy


def test_a_table_of_semicolons_that_lacks_a_column_is_told_by_its_columns(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("path;caption\na.png;x, y\n")
    columns = {"image_column": "path", "text_column": "caption"}
    for given in ({}, {"image_column": "path"}):
        with pytest.raises(Problem, match="found: path, caption"):
            _read(tmp_path / "data.csv", **given)
    assert list(_read(tmp_path / "data.csv", **columns).rows) == [Row("a.png", "x, y")]


def test_a_list_by_kohya(tmp_path: Path) -> None:
    _lay(tmp_path, "a.webp", "sub/b.png")
    listed = {
        "a": {"caption": "a star", "tags": "star, red", "train_resolution": [512, 512]}, "sub/b": {"tags": "moon"},
        "c.png": {"caption": "c"}, "d.png": {"train_resolution": [512, 512]}, "e.png": "x", "../f": {"caption": "f"},
    }  # fmt: skip
    (tmp_path / "meta_lat.json").write_text(json.dumps(listed, indent=1))
    manifest = _read(tmp_path / "meta_lat.json")
    assert list(manifest.rows) == [Row("a.webp", "a star, star, red"), Row("sub/b.png", "moon"), Row("c.png", "c")]
    assert [fault.kind for fault in manifest.faults] == ["missing_column", "wrong_type", "unsafe_path"]
    assert manifest.unread_columns == ("train_resolution",) and "(line 16)" in manifest.faults[0].where
    assert [row.text for row in _read(tmp_path / "meta_lat.json", text_column="tags").rows[:2]] == ["star, red", "moon"]
