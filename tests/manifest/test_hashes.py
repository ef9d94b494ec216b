"""A recorded hash tells a changed picture from the one that was meant, whatever a decoder makes of it."""

from __future__ import annotations

import hashlib
import pickle
import shutil
import subprocess
from pathlib import Path

import pytest

from ip_adapter_trainer.core.errors import Problem
from ip_adapter_trainer.images.decode import ImageFault
from ip_adapter_trainer.manifest.hashes import Hashes
from ip_adapter_trainer.prepare.check import check_rows as check
from ip_adapter_trainer.prepare.check_config import RowsCheckConfig as CheckConfig
from tests.manifest.rows import training_set, write_manifest, write_pictures


def _list(folder: Path, names: list[str]) -> Path:
    lines = [f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (folder / "SHA256SUMS").write_text("".join(lines))
    return folder / "SHA256SUMS"


def _flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    from PIL import Image

    for name in write_pictures(tmp_path, 4):
        Image.open(tmp_path / name).save(tmp_path / name, "BMP")
    return tmp_path


def _kinds(manifest: Path, listed: Path | str, **settings: int) -> list[str]:
    config = CheckConfig(data_json_file=str(manifest), image_hashes_file=str(listed), max_fault_rate=1, **settings)
    return [fault.kind for fault in check(config).faults]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bit_that_no_decoder_sees_is_a_fault_with_a_hash_only(folder: Path, workers: int) -> None:
    names = [f"{number}.png" for number in range(4)]
    listed, manifest = _list(folder, names), write_manifest(folder, names)
    assert _kinds(manifest, listed, dataloader_num_workers=workers) == []
    _flip(folder / "2.png", 1000)
    assert _kinds(manifest, "", dataloader_num_workers=workers) == []
    assert _kinds(manifest, listed, dataloader_num_workers=workers) == ["changed"]


def test_training_takes_the_next_row_for_a_changed_picture(folder: Path) -> None:
    names = [f"{number}.png" for number in range(4)]
    listed, manifest = _list(folder, names), write_manifest(folder, names)
    _flip(folder / "2.png", 1000)
    sample = training_set(manifest, image_hashes_file=str(listed))[0, 2]
    assert sample.row == 3 and [fault.kind for fault in sample.faults] == ["changed"]


def test_a_picture_that_is_not_listed_is_a_fault_however_others_are_spelled(folder: Path) -> None:
    listed = _list(folder, ["./0.png", "1.png"])
    assert _kinds(write_manifest(folder, ["0.png", "./1.png", "3.png"]), listed) == ["not_listed"]


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="no sha256sum here")
def test_it_reads_what_sha256sum_writes(tmp_path: Path) -> None:
    for name in ("a.png", "b c.png", "ü.png", "new\nline.png"):
        (tmp_path / name).write_bytes(name.encode())
    names = sorted(path.name for path in tmp_path.iterdir())
    for option in ("--text", "--binary"):
        out = subprocess.run(["sha256sum", option, *names], cwd=tmp_path, capture_output=True, check=True).stdout
        (tmp_path / "sums").write_bytes(out)
        hashes = Hashes.of(str(tmp_path / "sums"))
        assert len(hashes) == 4
        for name in names:
            hashes.demand(name, name.encode())
            with pytest.raises(ImageFault, match="another"):
                hashes.demand(name, b"x")


def test_it_travels_as_its_path(folder: Path) -> None:
    copies = [shutil.copy(folder / "0.png", folder / f"copy {number}.png") for number in range(50)]
    hashes = Hashes.of(str(_list(folder, ["0.png", *(Path(copy).name for copy in copies)])))
    assert len(pickle.dumps(hashes)) < 500
    pickle.loads(pickle.dumps(hashes)).demand("0.png", (folder / "0.png").read_bytes())


@pytest.mark.parametrize(
    ("content", "words"),
    [("nonsense\n", "line 1"), (f"{'a' * 64}  a.png\n{'a' * 63}  b.png\n", "line 2"), (f"{'a' * 64}  \n", "line 1"),
     (f"{'a' * 64}  a.png\n{'b' * 64}  ./a.png\n", "twice"), (f"{'a' * 64}  {'n' * 40_000}\n", "line 1")],
    ids=range(5),
)  # fmt: skip
def test_a_list_that_is_none_is_a_problem(content: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "sums").write_text(content)
    with pytest.raises(Problem) as caught:
        Hashes.of(str(tmp_path / "sums"))
    assert words in str(caught.value) and caught.value.fault.remedy


def test_a_list_that_is_not_there_is_a_problem(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(Problem, match="cannot be read"):
            Hashes.of(str(path))
