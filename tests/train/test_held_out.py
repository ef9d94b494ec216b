"""Validation looks at rows that nothing was trained on, beside rows that were."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ip_adapter_trainer.config import parse_train
from ip_adapter_trainer.core.errors import DataProblem, Problem
from ip_adapter_trainer.manifest.hold_out import hold_out
from ip_adapter_trainer.manifest.manifest import read_manifest
from tests.train.test_prepared import losses, own_rows


def test_held_out_rows_are_looked_at_and_not_trained_on(
    run: Callable, flags: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One of the held-out images is no picture: training never meets it, and validation does without."""
    rows: dict[str, object] = own_rows(tmp_path / "rows", 36) | {"validation_share": 0.01, "train_batch_size": 14}
    manifest = read_manifest(parse_train(flags(tmp_path / "out", **rows)))
    held = np.flatnonzero(hold_out(manifest.rows, 0.01, manifest.root))
    (tmp_path / "rows" / manifest.rows[held[0]].image_file).write_bytes(b"no picture")
    output = run(tmp_path / "out", **rows, num_validation_images=8, max_train_steps=2, max_fault_rate=0)
    said, last = capsys.readouterr().err, losses(output)[-1]
    assert (
        "held out: 8 of 36 rows are for validation only" in said and "rows                                 28" in said
    )
    assert "on 7 held-out rows" in said and "too few images to judge by" in said and "on 8 rows trained on" in said
    assert {"validation/gap_none", "validation/gap_shuffled", "training_rows/gap_shuffled"} <= set(last)
    assert "rows that cannot be read are not looked at; the first: data.json" in said
    assert not (output / "faults.jsonl").exists()


def test_another_set_takes_their_place_with_a_prepared_set_too(
    run: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own_rows(tmp_path / "other", 3)
    given = {"validation_data": tmp_path / "other" / "data.json", "num_validation_images": 3, "validation_share": 0}
    given |= {"max_train_steps": 4, "train_batch_size": 6, "grid_rows": 2, "grid_steps": 1}
    raw = run(tmp_path / "raw", **given)
    encoded = run(tmp_path / "encoded", **given, prepare="auto", prepare_text=True)
    assert capsys.readouterr().err.count("on 3 rows of --validation_data") == 2
    assert losses(raw)[-1] == pytest.approx(losses(encoded)[-1], rel=1e-4, abs=1e-6)
    grids = [np.asarray(Image.open(output / "grids" / "step-0000004.png"), float) for output in (raw, encoded)]
    assert np.abs(grids[0] - grids[1]).max() <= 2, "of the same rows"


@pytest.mark.parametrize(
    ("given", "share"),
    [
        ({}, 0.01),
        ({"num_validation_images": 0}, 0.0),
        ({"num_validation_images": 0, "grid_rows": 1}, 0.01),
        ({"validation_data": "other.json"}, 0.0),
        ({"validation_data": "other.json", "validation_share": 0.1}, 0.1),
    ],
)
def test_the_share_is_settled_when_a_run_begins(
    flags: Callable, tmp_path: Path, given: dict[str, object], share: float
) -> None:
    asked = [
        flag for flag in flags(tmp_path, **given) if given.get("validation_share") or "validation_share" not in flag
    ]
    assert parse_train(asked).validation_share == share


def test_a_validation_set_that_is_none_is_refused(run: Callable, tmp_path: Path, rows_folder: Path) -> None:
    (tmp_path / "none.json").write_text('[{"image_file": 1, "text": "a"}]')
    missing = {"pretrained_model_name_or_path": tmp_path, "family": "sd"}
    with pytest.raises(DataProblem, match="1 of 1 rows are faulty"):
        run(tmp_path / "out", validation_data=tmp_path / "none.json", **missing)
    with pytest.raises(Problem, match="all rows of the validation set show images that are trained on"):
        run(tmp_path / "out", validation_data=rows_folder / "data.json", validation_root_path=rows_folder / "images")
    with pytest.raises(Problem, match="validation_data is not looked at"):
        run(tmp_path / "out", validation_data=tmp_path / "none.json", num_validation_images=0, **missing)


def test_a_validation_set_that_cannot_be_read_is_refused_and_hashes_are_of_training_images(
    run: Callable, tmp_path: Path, rows_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own_rows(tmp_path / "other", 3)
    given = {"validation_data": tmp_path / "other" / "data.json", "max_train_steps": 1, "save_steps": 9}
    with pytest.raises(Problem, match="no row of the validation set can be read"):
        run(tmp_path / "out", **given, validation_root_path=tmp_path)
    hashes = [f"{sha256(f.read_bytes()).hexdigest()}  {f.name}" for f in (rows_folder / "images").iterdir()]
    (tmp_path / "sums").write_text("\n".join(hashes))
    run(tmp_path / "out", **given, image_hashes_file=tmp_path / "sums")
    assert "on 2 rows of --validation_data" in capsys.readouterr().err


def test_images_that_a_step_has_too_many_of_are_told(
    run: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = own_rows(tmp_path / "rows", 12, sizes=((32, 32), (32, 32), (32, 32), (32, 64)))
    run(
        tmp_path / "out",
        **rows,
        aspect_ratio_buckets=True,
        bucket_step_px=8,
        train_batch_size=8,
        max_train_steps=2,
        dry_run=True,
    )
    assert "3 of 12 images are not trained on in every epoch" in (said := capsys.readouterr().err)
    assert "3 images are in no step of this run (width x height: 3 of 40x24)" in said
