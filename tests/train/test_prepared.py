"""Training from a prepared set is training from the pictures: the same order, losses and weights, nothing encoded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ip_adapter_trainer.config import parse
from ip_adapter_trainer.core.errors import Problem
from ip_adapter_trainer.families.sd import SDCodec
from ip_adapter_trainer.families.sdxl import SDXLCodec
from ip_adapter_trainer.prepare.config import PrepareConfig
from ip_adapter_trainer.prepare.run import PrepareReport, prepare
from ip_adapter_trainer.train import checkpoint
from ip_adapter_trainer.train import run as running
from ip_adapter_trainer.train.config import LeanConfig
from ip_adapter_trainer.train.loop import Loop
from ip_adapter_trainer.train.step import Step
from tests import tiny
from tests.manifest.rows import write_manifest, write_pictures
from tests.train.test_resume import launched


def losses(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def weights(output: Path, step: int) -> dict[str, torch.Tensor]:
    return torch.load(output / f"checkpoint-{step}" / checkpoint.WEIGHTS, weights_only=True)


def prepared(flags: Callable, output: Path, folder: Path, **more: object) -> PrepareReport:
    """Prepares what a run with these settings needs, in batches of the run's own size unless told."""
    more = {"encode_batch_size": 2} | more
    fields = PrepareConfig.model_fields
    argv = [f for f in flags(output, **more) if f.removeprefix("--").split("=")[0] in fields]
    return prepare(parse(PrepareConfig, [*argv, f"--prepared_dir={folder}"], prog="prepare"))


def own_rows(folder: Path, count: int, sizes: tuple[tuple[int, int], ...] = ((32, 48), (48, 32), (40, 40))) -> dict:
    """Rows without prompt images, of several shapes; flags that name them."""
    folder.mkdir(exist_ok=True)
    manifest = write_manifest(folder, write_pictures(folder, count, sizes=sizes))
    return {"data_json_file": manifest, "data_root_path": folder}


def assert_same_training(raw: Path, encoded: Path, steps: int = 4) -> None:
    """Losses and weights bit for bit; validation, whose batches have other sizes, to rounding."""
    for one, other in zip(losses(raw), losses(encoded), strict=True):
        if "loss" in one:
            assert one == other
        assert one == pytest.approx(other, rel=1e-5, abs=1e-6)
    a, b = weights(raw, steps), weights(encoded, steps)
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("extra", [
    {"variant": "base"}, {"variant": "plus"}, {"variant": "full"}, {"base": "sdxl"}, {"prompt_pad_square": True},
], ids=lambda e: "-".join(map(str, e.values())))  # fmt: skip
def test_losses_and_adapter_are_those_of_the_raw_rows(
    run: Callable, flags: Callable, tmp_path: Path, extra: dict[str, object]
) -> None:
    report = prepared(flags, tmp_path / "raw", tmp_path / "set", **extra)
    assert report.images == 24 and report.encoded == 24 and not report.faulty_rows
    assert_same_training(
        run(tmp_path / "raw", **extra), run(tmp_path / "encoded", prepared_dir=tmp_path / "set", **extra)
    )


def test_batches_of_another_size_differ_by_rounding_only(run: Callable, flags: Callable, tmp_path: Path) -> None:
    prepared(flags, tmp_path / "raw", tmp_path / "set", encode_batch_size=5)
    raw, encoded = run(tmp_path / "raw"), run(tmp_path / "encoded", prepared_dir=tmp_path / "set")
    for one, other in zip(losses(raw), losses(encoded), strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-6)
    for key, value in weights(raw, 4).items():
        torch.testing.assert_close(weights(encoded, 4)[key], value, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("workers", [0, 2])
def test_flips_and_buckets_fall_as_they_do_on_raw_rows(
    run: Callable, flags: Callable, tmp_path: Path, workers: int
) -> None:
    extra = own_rows(tmp_path / "rows", 12) | {
        "random_flip": True, "aspect_ratio_buckets": True, "bucket_step_px": 8, "dataloader_num_workers": workers,
        "base": "sdxl",
    }  # fmt: skip
    report = prepared(flags, tmp_path / "raw", tmp_path / "set", **extra)
    assert report.encoded == 12 * 2 * 2, "plain and mirrored, latents and features"
    assert_same_training(
        run(tmp_path / "raw", **extra), run(tmp_path / "encoded", prepared_dir=tmp_path / "set", **extra)
    )


def test_nothing_is_encoded_in_a_step(
    run: Callable, flags: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ip_adapter_trainer.encoders import ImageEncoder
    from ip_adapter_trainer.families._kl import KLCodec

    prepared(flags, tmp_path / "raw", tmp_path / "set")

    def refuse(*args: object) -> None:
        raise AssertionError("encoded")

    monkeypatch.setattr(ImageEncoder, "encode", refuse)
    monkeypatch.setattr(KLCodec, "moments", refuse)
    run(tmp_path / "encoded", prepared_dir=tmp_path / "set", grid_rows=2, grid_steps=1)


def held_bytes(*modules: torch.nn.Module | None) -> int:
    """Bytes of weights that are on a device."""
    return sum(t.nbytes for m in modules if m for t in (*m.parameters(), *m.buffers()) if t.device.type != "meta")


@pytest.mark.parametrize("variant", ["base", "plus"])
def test_a_prepared_run_holds_no_encoders_and_draws_the_same_grid(
    run: Callable, flags: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str
) -> None:
    extra = own_rows(tmp_path / "rows", 8) | {"grid_rows": 3, "grid_steps": 2, "use_ema": True, "variant": variant}
    extra |= {"aspect_ratio_buckets": True, "bucket_step_px": 8}
    prepared(flags, tmp_path / "raw", tmp_path / "set", **extra)
    held, go = [], running.run_loop

    def look(loop: Loop, step: Step, layers: LeanConfig) -> None:
        vae = step.model.codec.autoencoder
        held.append((held_bytes(step.model.encoder.model), held_bytes(vae.encoder, vae.quant_conv)))
        go(loop, step, layers)

    monkeypatch.setattr(running, "run_loop", look)
    raw = run(tmp_path / "raw", **extra)
    encoded = run(tmp_path / "encoded", prepared_dir=tmp_path / "set", **extra)
    assert min(held[0]) > 0 and held[1] == (0, 0)
    assert_same_training(raw, encoded)
    grids = [np.asarray(Image.open(next((output / "grids").iterdir()))).astype(int) for output in (raw, encoded)]
    assert np.abs(grids[0] - grids[1]).max() <= 1, "rounding: pictures were encoded in other batches"


@pytest.mark.parametrize("base", ["sd1", "sd2v", "sdxl"])
def test_text_that_was_kept_trains_the_same_and_is_not_encoded_again(
    run: Callable, flags: Callable, rows_folder: Path, tmp_path: Path, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, manifest = json.loads((rows_folder / "data.json").read_text()), tmp_path / "rows.json"
    for number, row in enumerate(rows[::2]):
        row["text"] = [row["text"], None, f"a second caption of row {number}"]
    manifest.write_text(json.dumps(rows))
    extra = {"base": base, "text_drop_rate": 0.4, "data_json_file": manifest}
    prepared(flags, tmp_path / "raw", tmp_path / "set", prepare_text=True, **extra)
    raw = run(tmp_path / "raw", **extra)
    kind = SDXLCodec if base == "sdxl" else SDCodec
    honest = kind.encode

    def probe_only(self: object, texts: list[str]) -> dict[str, torch.Tensor]:
        assert texts == [""], "only what the tables look like is asked"
        return honest(self, texts)

    monkeypatch.setattr(kind, "encode", probe_only)
    encoded = {"prepared_dir": tmp_path / "set", "prepare_text": True}
    assert_same_training(raw, run(tmp_path / "encoded", **encoded, **extra))
    rows[4]["text"].append("a third one")
    manifest.write_text(json.dumps(rows))
    with pytest.raises(Problem, match="lacks 1 of 12 rows"):
        run(tmp_path / "more", **encoded, **extra)


def test_a_set_without_text_is_told_where_text_is_wanted(run: Callable, flags: Callable, tmp_path: Path) -> None:
    prepared(flags, tmp_path / "raw", tmp_path / "set")
    with pytest.raises(Problem, match=r"lacks 12 of 12 rows[^$]*ip-adapter prepare[^$]*--prepare_text"):
        run(tmp_path / "encoded", prepared_dir=tmp_path / "set", prepare_text=True)
    with pytest.raises(Problem, match="no prepared set to keep text in"):
        run(tmp_path / "encoded", prepare_text=True)
    run(tmp_path / "auto", prepare="auto", prepare_text=True, max_train_steps=14)
    assert list((tmp_path / "auto" / "prepared" / "context").iterdir())


def test_a_faulty_row_is_replaced_by_the_same_row(run: Callable, flags: Callable, tmp_path: Path) -> None:
    extra = own_rows(tmp_path / "rows", 8) | {"max_fault_rate": 0.5, "aspect_ratio_buckets": True, "bucket_step_px": 8}
    for number in (1, 5):
        file = tmp_path / "rows" / f"{number}.png"
        file.write_bytes(file.read_bytes()[:-60])
    report = prepared(flags, tmp_path / "raw", tmp_path / "set", **extra)
    assert report.faulty_rows == 2
    raw = run(tmp_path / "raw", **extra)
    encoded = run(tmp_path / "encoded", prepared_dir=tmp_path / "set", **extra)
    assert_same_training(raw, encoded)
    a, b = ((output / "faults.jsonl").read_text().splitlines() for output in (raw, encoded))
    assert sorted(a) == sorted(b) and len(a) == 2


def test_a_set_serves_without_its_pictures_and_then_draws_no_grid(
    run: Callable, flags: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extra = own_rows(tmp_path / "rows", 6) | {"grid_rows": 2, "grid_steps": 2}
    prepared(flags, tmp_path / "raw", tmp_path / "set", **extra)
    raw = run(tmp_path / "raw", **extra)
    for image in (tmp_path / "rows").glob("*.png"):
        image.unlink()
    encoded = run(tmp_path / "encoded", prepared_dir=tmp_path / "set", **extra)
    assert_same_training(raw, encoded)
    assert "no grid" in capsys.readouterr().err
    assert prepared(flags, tmp_path / "raw", tmp_path / "set", **extra).read == 0


def test_a_picture_that_changed_is_a_fault_and_never_served_stale(
    run: Callable, flags: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extra = own_rows(tmp_path / "rows", 6) | {"max_fault_rate": 0.5, "grid_rows": 6, "grid_steps": 1}
    prepared(flags, tmp_path / "raw", tmp_path / "set", **extra)
    shutil.copy(tmp_path / "rows" / "0.png", tmp_path / "rows" / "3.png")
    encoded = run(tmp_path / "encoded", prepared_dir=tmp_path / "set", **extra)
    assert "no grid, its images cannot be read, or are not those that were prepared" in capsys.readouterr().err
    fault = json.loads((encoded / "faults.jsonl").read_text())
    assert fault["kind"] == "changed" and "3.png" in fault["where"] and "prepare" in fault["remedy"]
    report = prepared(flags, tmp_path / "raw", tmp_path / "set", **extra)
    assert report.encoded == 0, "the same content was encoded under another name"
    assert_same_training(
        run(tmp_path / "raw", **extra), run(tmp_path / "again", prepared_dir=tmp_path / "set", **extra)
    )


def test_a_picture_that_became_a_link_out_of_the_root_is_the_same_fault(
    run: Callable, flags: Callable, tmp_path: Path
) -> None:
    extra = own_rows(tmp_path / "rows", 6) | {"max_fault_rate": 0.5}
    prepared(flags, tmp_path / "raw", tmp_path / "set", **extra)
    (tmp_path / "rows" / "3.png").rename(tmp_path / "3.png")
    (tmp_path / "rows" / "3.png").symlink_to(tmp_path / "3.png")
    raw, encoded = run(tmp_path / "raw", **extra), run(tmp_path / "encoded", prepared_dir=tmp_path / "set", **extra)
    assert_same_training(raw, encoded)
    a, b = ((output / "faults.jsonl").read_text() for output in (raw, encoded))
    assert a == b and json.loads(a)["kind"] == "unsafe_path"


def test_values_that_were_damaged_on_the_disk_are_faults_that_name_the_file(
    run: Callable, flags: Callable, tmp_path: Path
) -> None:
    extra = own_rows(tmp_path / "rows", 6) | {"max_fault_rate": 0.5}
    prepared(flags, tmp_path / "raw", tmp_path / "set", **extra)
    (shard,) = (tmp_path / "set").glob("moments/*/*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 64  # values come last, or in other versions of safetensors first
    shard.write_bytes(content)
    encoded = run(tmp_path / "encoded", prepared_dir=tmp_path / "set", **extra)
    fault = json.loads((encoded / "faults.jsonl").read_text())
    assert fault["kind"] == "damaged_values" and str(shard) in fault["remedy"]
    shard.unlink()
    prepared(flags, tmp_path / "raw", tmp_path / "set", **extra)
    assert_same_training(
        run(tmp_path / "raw", **extra), run(tmp_path / "again", prepared_dir=tmp_path / "set", **extra)
    )


def test_rows_that_a_set_lacks_are_told_with_the_command(run: Callable, flags: Callable, tmp_path: Path) -> None:
    prepared(flags, tmp_path / "raw", tmp_path / "set")
    with pytest.raises(Problem, match=r"lacks 12 of 12 rows[^$]*ip-adapter prepare[^$]*--resolution=64"):
        run(tmp_path / "encoded", prepared_dir=tmp_path / "set", resolution=64)
    other = tiny.make_encoder(tmp_path / "encoder", seed=5)
    with pytest.raises(Problem, match="lacks 12 of 12 rows"):
        run(tmp_path / "encoded", prepared_dir=tmp_path / "set", image_encoder_path=other)
    with pytest.raises(Problem, match="prompt_flip"):
        run(tmp_path / "encoded", prepared_dir=tmp_path / "set", prompt_flip=True)


def test_processes_share_the_look_at_a_set_and_tell_all_that_it_lacks(flags: Callable, tmp_path: Path) -> None:
    prepared(flags, tmp_path / "raw", tmp_path / "set")
    process = launched(flags(tmp_path / "encoded", prepared_dir=tmp_path / "set", resolution=64))
    assert "lacks 12 of 12 rows" in process.communicate(timeout=200)[0] and process.returncode


def test_a_set_is_prepared_where_it_pays_and_says_so(
    run: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = run(tmp_path / "short", prepare=None)
    assert "not preparing: 0.7 epochs" in capsys.readouterr().err and not (short / "prepared").exists()
    drawn = run(tmp_path / "drawn", prepare=None, max_train_steps=14, prompt_flip=True)
    assert "not preparing: --prompt_flip" in capsys.readouterr().err and not (drawn / "prepared").exists()
    raw = run(tmp_path / "raw", max_train_steps=14)
    long = run(tmp_path / "long", prepare=None, max_train_steps=14, encode_batch_size=2)
    assert "preparing first: 2.3 epochs" in capsys.readouterr().err and (long / "prepared").exists()
    assert_same_training(raw, long, 14)
