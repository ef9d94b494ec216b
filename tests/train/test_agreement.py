"""`check` and `train` judge a set alike: 0 if the run goes through, 3 if its rows are too faulty for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ip_adapter_trainer.config import parse_train, write_resolved
from ip_adapter_trainer.core.errors import DataProblem
from ip_adapter_trainer.feed.config import DataConfig
from ip_adapter_trainer.prepare.check import check_rows as check
from ip_adapter_trainer.prepare.check_config import RowsCheckConfig as CheckConfig
from ip_adapter_trainer.train.run import train

BUCKETS = {"aspect_ratio_buckets": True, "bucket_step_px": 8}
SETS: dict[str, tuple[str, dict[str, Any], int]] = {  # o: sound, t: cut short, p: its prompt is, b: no row, w: wide
    "one sound row": ("o", {}, 0),
    "one that cannot be read": ("t", {}, 3),
    "two": ("to", {}, 0),
    "all, none being too many": ("tt", {"max_fault_rate": 1.0}, 3),
    "all in the manifest": ("bb", {"max_fault_rate": 1.0}, 3),
    "one in the manifest, one picture": ("bt", {"max_fault_rate": 1.0}, 3),
    "one, where none may be": ("ooot", {"max_fault_rate": 0.0}, 3),
    "image prompts": ("oopp", {}, 3),
    "a few in turn": (f"o{'t' * 15}o", {"max_fault_rate": 1.0}, 0),
    "many in turn, around the end": (f"{'t' * 8}oo{'t' * 8}", {"max_fault_rate": 1.0}, 3),
    "a whole bucket": ("oooW", {"max_fault_rate": 0.5} | BUCKETS, 3),
    "part of a bucket": ("ooowW", {"max_fault_rate": 0.5} | BUCKETS, 0),
    "the sound rows held out": ("ottott", {"max_fault_rate": 1.0, "validation_share": 0.01}, 3),
}


def _lay(folder: Path, kinds: str) -> Path:
    rows = []
    for number, kind in enumerate(kinds):
        size = (64, 32) if kind in "wW" else (32, 32)
        name = f"{number}.png"
        Image.effect_noise(size, 80).convert("RGB").save(folder / name)
        if kind in "tW":
            (folder / name).write_bytes((folder / name).read_bytes()[:200])
        rows.append({"image_file": name, "text": 7 if kind == "b" else ""})
        if kind == "p":
            rows[-1]["prompt_image_file"] = "none.png"
    (folder / "data.json").write_text(json.dumps(rows))
    return folder / "data.json"


@pytest.mark.parametrize("name", SETS)
def test_the_exit_codes_are_the_same(name: str, flags: Callable[..., list[str]], tmp_path: Path) -> None:
    kinds, settings, exit_code = SETS[name]
    data = {"data_json_file": str(_lay(tmp_path, kinds)), "validation_share": 0, **settings, "resolution": 32}
    assert check(CheckConfig(**data)).exit_code == exit_code
    images = 1 if "aspect_ratio_buckets" in settings else len(kinds)  # a bucket fills batches of its own
    given = flags(
        tmp_path / "out", **data, data_root_path="", train_batch_size=images, max_train_steps=len(kinds) // images,
        num_validation_images=0, save_steps=100,
    )  # fmt: skip
    if exit_code:
        with pytest.raises(DataProblem):
            train(parse_train(given), write_resolved)
        assert (tmp_path / "out").exists() == (set(kinds) != {"b"}), "known from the manifest: nothing is begun"
    else:
        train(parse_train(given), write_resolved)


def test_check_groups_rows_as_training_does() -> None:
    assert CheckConfig(data_json_file="d").buckets() == DataConfig(data_json_file="d").buckets()
