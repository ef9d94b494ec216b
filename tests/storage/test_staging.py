"""Files and folders exist whole or not at all; what a dead process left is swept, and nothing good with it."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path

import pytest

from ip_adapter_trainer.storage.checkpoints import MANIFEST, all_checkpoints, sha256_of, verified
from ip_adapter_trainer.storage.staging import lock, staged_file, staged_folder, sweep, sweep_stages


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_when_its_block_ends(tmp_path: Path) -> None:
    with staged_file(tmp_path / "a.bin") as stage:
        assert stage.parent == tmp_path and stage.suffix == ".bin" and stage.name.startswith(".")
        stage.write_text("new")
        assert not (tmp_path / "a.bin").exists()
    assert names(tmp_path) == ["a.bin"]


@pytest.mark.skipif(os.name == "nt", reason="permissions are POSIX's")
def test_whoever_wrote_it_others_may_read_it_as_usual(tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    with staged_file(tmp_path / "a.safetensors") as stage:
        stage.touch(mode=0o600)
    with staged_folder(tmp_path / "out") as stage:
        (stage / "file").touch(mode=0o600)
    modes = {(tmp_path / name).stat().st_mode for name in ("usual", "a.safetensors", "out/file")}
    assert len(modes) == 1


def test_a_failed_block_leaves_the_old_file_and_no_stage(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_text("old")
    with pytest.raises(RuntimeError), staged_file(tmp_path / "a.bin") as stage:
        stage.write_text("new")
        raise RuntimeError
    assert names(tmp_path) == ["a.bin"] and (tmp_path / "a.bin").read_text() == "old"


def test_a_folder_replaces_an_older_one_only_when_its_block_ends_well(tmp_path: Path) -> None:
    final = tmp_path / "out"
    for text in ("old", "new"):
        with staged_folder(final) as stage:
            (stage / "inner").mkdir()
            (stage / "inner" / text).write_text(text)
    assert names(tmp_path) == ["out"] and names(final / "inner") == ["new"]
    with pytest.raises(RuntimeError), staged_folder(final) as stage:
        raise RuntimeError
    assert names(tmp_path) == ["out"] and names(final / "inner") == ["new"]


def test_a_folder_lost_between_two_renames_gets_its_name_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    final = tmp_path / "out"
    with staged_folder(final) as stage:
        (stage / "good").touch()
    rename = Path.rename

    def dies_at_the_second(path: Path, target: Path) -> Path:
        if target == final:
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", dies_at_the_second)
    with pytest.raises(KeyboardInterrupt), staged_folder(final):
        pass
    monkeypatch.undo()
    assert names(tmp_path) == [".out.replaced"]
    sweep(tmp_path)
    assert names(tmp_path) == ["out"] and names(final) == ["good"]


def test_sweeping_removes_stages_and_nothing_else(tmp_path: Path) -> None:
    for name in (".a.bin.1.staged.bin", "a.bin", ".hidden", "b.staged"):
        (tmp_path / name).touch()
    for name in (".checkpoint-2.7.staged", ".checkpoint-1.removing", ".checkpoint-2.replaced", "checkpoint-2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    sweep(tmp_path)
    assert names(tmp_path) == [".hidden", "a.bin", "b.staged", "checkpoint-2"]


def test_only_the_stages_of_one_file_are_swept(tmp_path: Path) -> None:
    others = [".a.bin.x.bin.7.staged.bin", ".b.bin.7.staged.bin", ".a.bin.7.staged", "a.bin"]
    for name in [".a.bin.7.staged.bin", ".a.bin.12.staged.bin", *others]:
        (tmp_path / name).touch()
    sweep_stages(tmp_path / "a.bin")
    assert names(tmp_path) == sorted(others)


def test_checkpoints_are_ordered_by_step(tmp_path: Path) -> None:
    for name in ("checkpoint-10", "checkpoint-9", "checkpoint-x", ".checkpoint-11.staged"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-12").touch()
    assert [path.name for path in all_checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10"]


@pytest.mark.parametrize("manifest", ["[]", '["weights"]', "3", "null", '{"weights": []}', '{"weights": {}}'])
def test_a_manifest_that_lists_no_hashes_verifies_nothing(tmp_path: Path, manifest: str) -> None:
    (tmp_path / "weights").write_bytes(b"1234")
    (tmp_path / MANIFEST).write_text(manifest)
    assert not verified(tmp_path)


def test_a_checkpoint_verifies_until_a_byte_changes(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"1234")
    (tmp_path / "other").write_bytes(b"12")
    entries = {
        n: {"sha256": sha256_of(tmp_path / n), "bytes": (tmp_path / n).stat().st_size} for n in ("weights", "other")
    }
    assert not verified(tmp_path), "no manifest"
    (tmp_path / MANIFEST).write_text(json.dumps(entries))
    assert verified(tmp_path)
    (tmp_path / "weights").write_bytes(b"1235")
    assert not verified(tmp_path) and not verified(tmp_path, ["weights"]) and verified(tmp_path, ["other"])
    assert not verified(tmp_path, ["missing"])
    for damaged in ("[]", "{", '{"weights": 3}'):
        (tmp_path / MANIFEST).write_text(damaged)
        assert not verified(tmp_path, ["weights"])


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
