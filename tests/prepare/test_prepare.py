"""`ip-adapter prepare`: encodes what is missing and nothing else, however it was broken off or shared."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPVisionModelWithProjection

from ip_adapter_trainer.cache import shards
from ip_adapter_trainer.config import parse
from ip_adapter_trainer.core.errors import DataProblem, Problem, StorageProblem
from ip_adapter_trainer.prepare import run as running
from ip_adapter_trainer.prepare.config import PrepareConfig, command
from ip_adapter_trainer.prepare.run import PrepareReport, prepare
from ip_adapter_trainer.runtime.launch import Runtime
from tests import tiny
from tests.manifest.rows import write_manifest, write_pictures


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A folder of eight pictures, old enough to be known again by their times, and their manifest."""
    folder = tmp_path / "rows"
    folder.mkdir()
    for name in write_pictures(folder, 8, sizes=((32, 48), (48, 32))):
        age(folder / name)
    write_manifest(folder, [f"{number}.png" for number in range(8)])
    return folder


def age(file: Path) -> None:
    os.utime(file, (time.time() - 3600,) * 2)


@pytest.fixture
def flags(rows: Path, base_folder: Callable, encoder_folder: Path, tmp_path: Path) -> Callable[..., list[str]]:
    def make(**more: object) -> list[str]:
        settings: dict[str, object] = {
            "pretrained_model_name_or_path": base_folder("sd1"), "image_encoder_path": encoder_folder,
            "data_json_file": rows / "data.json", "prepared_dir": tmp_path / "set", "resolution": 32,
            "bucket_step_px": 8, "encode_batch_size": 2,
        }  # fmt: skip
        return [f"--{k}" if v is True else f"--{k}={v}" for k, v in (settings | more).items()]

    return make


@pytest.fixture
def go(flags: Callable[..., list[str]]) -> Callable[..., PrepareReport]:
    return lambda **more: prepare(parse(PrepareConfig, flags(**more), prog="prepare"))


def content(root: Path) -> dict[str, dict[bytes, bytes]]:
    """Every row of every table of encodings, by address."""
    from safetensors.torch import load_file

    tables: dict[str, dict[bytes, bytes]] = {}
    for file in root.rglob("*.safetensors"):
        shard = load_file(file)
        if "pictures" in file.parts:
            continue
        table = tables.setdefault(str(file.parent.relative_to(root)), {})
        for key, value in zip(shard["key"], shard["value"], strict=True):
            table[bytes(key.numpy())] = bytes(value.reshape(-1).view(torch.uint8).numpy())
    return tables


def test_a_second_run_reads_and_encodes_nothing(go: Callable, tmp_path: Path) -> None:
    first = go()
    before = content(tmp_path / "set")
    second = go()
    assert (first.images, first.read, first.encoded) == (8, 8, 16)
    assert (second.images, second.read, second.encoded) == (8, 0, 0)
    assert content(tmp_path / "set") == before and [len(table) for table in before.values()] == [8, 8]


def test_a_touched_picture_is_read_and_not_encoded(go: Callable, rows: Path) -> None:
    go()
    os.utime(rows / "3.png", (time.time() - 60,) * 2)
    assert (go().read, go().read) == (1, 0)


def test_a_file_as_young_as_its_record_is_not_trusted(go: Callable, rows: Path) -> None:
    (rows / "3.png").touch()
    go()
    assert go().read == 1


def test_a_changed_picture_is_encoded_again_and_alone(go: Callable, rows: Path) -> None:
    go()
    status = (rows / "3.png").stat()
    image = bytearray((rows / "4.png").read_bytes())
    (rows / "3.png").write_bytes(image)
    os.utime(rows / "3.png", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    shutil.copy(rows / "4.png", rows / "spare.png")
    assert (again := go()).read == 1 and again.encoded == 0, "the same content as another's"
    from PIL import Image

    Image.new("RGB", (40, 40), "red").save(rows / "3.png")
    age(rows / "3.png")
    assert (again := go()).read == 1 and again.encoded == 2


@pytest.mark.parametrize(("change", "encoded"), [
    ({"resolution": 40}, 8), ({"random_flip": True}, 16), ({"prompt_pad_square": True}, 8), ({"variant": "plus"}, 8),
    ({"variant": "full", "both_features": True}, 8), ({"alpha_background": "black"}, 16),
    ({"aspect_ratio_buckets": True}, 8), ({"mixed_precision": "bf16"}, 16),
], ids=lambda c: "-".join(c) if isinstance(c, dict) else "")  # fmt: skip
def test_other_settings_encode_what_they_change(go: Callable, change: dict[str, object], encoded: int) -> None:
    go()
    assert go(**change).encoded == encoded
    assert go(**change).encoded == 0
    assert go().encoded == 0, "what was there before still is"


def test_other_encoders_encode_their_part(go: Callable, base_folder: Callable, tmp_path: Path) -> None:
    go()
    assert go(image_encoder_path=tiny.make_encoder(tmp_path / "encoder", seed=7)).encoded == 8
    assert go(pretrained_model_name_or_path=tiny.make_base(tmp_path / "base", seed=7)).encoded == 8
    assert go().encoded == 0


def test_both_kinds_of_feature_come_of_one_pass_and_serve_every_variant(
    go: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = []
    honest = CLIPVisionModelWithProjection.forward
    monkeypatch.setattr(
        CLIPVisionModelWithProjection, "forward", lambda *a, **k: (passes.append(1), honest(*a, **k))[1]
    )
    assert go(both_features=True).encoded == 8 * 2 and len(passes) == 4, "batches of two"
    assert go(variant="base").encoded == go(variant="plus").encoded == 0
    for variant in ("base", "plus"):
        go(variant=variant, prepared_dir=tmp_path / "apart")
    assert content(tmp_path / "set") == content(tmp_path / "apart"), "bit for bit as one kind at a time"


@pytest.mark.parametrize("base", ["sd1", "sdxl"])
def test_only_the_encoders_are_loaded(
    go: Callable, base_folder: Callable, monkeypatch: pytest.MonkeyPatch, base: str
) -> None:
    def refuse(*args: object, **settings: object) -> None:
        raise AssertionError("loaded")

    for needless in (UNet2DConditionModel, CLIPTextModel, CLIPTextModelWithProjection):
        monkeypatch.setattr(needless, "from_pretrained", refuse)
    assert go(pretrained_model_name_or_path=base_folder(base)).encoded == 16


@pytest.mark.parametrize(("base", "tables"), [("sd1", {"context"}), ("sdxl", {"context", "text_embeds"})])
def test_each_caption_is_encoded_once_and_only_where_that_is_asked(
    go: Callable, rows: Path, base_folder: Callable, tmp_path: Path, base: str, tables: set[str]
) -> None:
    (rows / "data.json").write_text((rows / "data.json").read_text().replace("picture 3.png", "picture 4.png"))
    model = {"pretrained_model_name_or_path": base_folder(base)}
    assert go(**model).captions == 0
    first = go(**model, prepare_text=True)
    assert (first.captions, first.encoded) == (8, 0), "seven captions and the empty one"
    assert {folder.name for folder in (tmp_path / "set").iterdir() if folder.is_dir()} == {
        "moments", "image_embeds", "pictures", *tables
    }  # fmt: skip
    assert go(**model, prepare_text=True).captions == 0
    assert go(**model, prepare_text=True, mixed_precision="bf16").captions == 8
    other = tiny.make_base(tmp_path / "other", base, seed=7)  # type: ignore[arg-type]
    assert go(pretrained_model_name_or_path=other, prepare_text=True).captions == 8


def test_the_disk_that_is_told_counts_the_text(go: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go(prepared_dir=tmp_path / "plain")
    filled = sum(file.stat().st_size for file in (tmp_path / "plain").rglob("*.safetensors"))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(running.shutil, "disk_usage", lambda path: usage(0, 0, 2**20 + int(1.3 * filled)))
    with pytest.raises(StorageProblem, match="too small"):
        go(prepare_text=True)
    go()


def test_faults_are_counted_and_tried_again(go: Callable, rows: Path, tmp_path: Path) -> None:
    whole = (rows / "2.png").read_bytes()
    (rows / "2.png").write_bytes(whole[:-60])
    with pytest.raises(DataProblem, match="1 of 8 rows are faulty"):
        go(max_fault_rate=0)
    report = go(max_fault_rate=0.2)
    assert report.faulty_rows == 1 and "2.png" in (tmp_path / "set" / "faults.jsonl").read_text()
    (rows / "2.png").write_bytes(whole)
    assert (mended := go(max_fault_rate=0)).faulty_rows == 0 and mended.encoded == 2


def test_a_disk_too_small_is_told_before_anything_is_written(
    go: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(running.shutil, "disk_usage", lambda path: usage(10, 9, 2**20))
    with pytest.raises(StorageProblem, match=r"too small: .* needed at most, 1.0 MB free"):
        go()
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("flag", ["no_center_crop", "prompt_flip", "prompt_crop_min_share"])
def test_what_is_drawn_anew_is_refused(go: Callable, flag: str) -> None:
    with pytest.raises(Problem, match=f"--{flag} cut each image otherwise"):
        go(**{flag: 0.5 if flag == "prompt_crop_min_share" else True})


def test_values_that_are_not_finite_are_refused(go: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    from ip_adapter_trainer.core.errors import NotFiniteProblem
    from ip_adapter_trainer.families._kl import KLCodec

    honest = KLCodec.moments
    monkeypatch.setattr(KLCodec, "moments", lambda self, pixels: honest(self, pixels) * float("nan"))
    with pytest.raises(NotFiniteProblem, match="not finite"):
        go()


def test_the_command_that_is_told_prepares_the_same(flags: Callable) -> None:
    import shlex

    config = parse(PrepareConfig, flags(variant="plus", random_flip=True), prog="prepare")
    words = shlex.split(command(config))
    assert words[:2] == ["ip-adapter", "prepare"] and parse(PrepareConfig, words[2:], prog="prepare") == config


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


SLOWLY = """
import sys, time
from ip_adapter_trainer import cli
from ip_adapter_trainer.cache import shards
from ip_adapter_trainer.prepare.encode import Encoding
shards._SEAL_S = float(sys.argv[1])
honest = Encoding._encode
Encoding._encode = lambda self, *a: (honest(self, *a), print("encoded", flush=True), time.sleep(0.3))[0]
raise SystemExit(cli.guarded(cli._prepare, sys.argv[2:]))
"""


@pytest.mark.parametrize(
    ("number", "code", "seal_s"),
    [(signal.SIGKILL, -9, 0.0), (signal.SIGTERM, 143, shards._SEAL_S), (signal.SIGINT, 130, shards._SEAL_S)],
    ids=["KILL", "TERM", "INT"],
)
def test_broken_off_it_goes_on_where_it_was(
    go: Callable, flags: Callable, tmp_path: Path, number: signal.Signals, code: int, seal_s: float
) -> None:
    go(prepared_dir=tmp_path / "whole")
    argv = [sys.executable, "-c", SLOWLY, str(seal_s), *flags()]
    process = subprocess.Popen(argv, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"encoded\n"
    process.send_signal(number)
    _, told = process.communicate(timeout=60)
    assert process.returncode == code
    assert number == signal.SIGKILL or b"are made and kept; run the same command again to go on" in told
    assert 0 < (again := go()).encoded < 16
    assert again.read <= 8 and go().encoded == 0
    assert content(tmp_path / "set") == content(tmp_path / "whole")
    assert not list((tmp_path / "set").rglob(".*.staged*"))


def test_preparing_leaves_its_group(go: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[object] = []
    monkeypatch.setattr(Runtime, "__exit__", lambda *ending: left.append(ending[1]))
    go()
    assert left == [None]


def test_two_processes_give_the_same_set(go: Callable, flags: Callable, tmp_path: Path) -> None:
    go(prepared_dir=tmp_path / "whole", prepare_text=True)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--multi_gpu"]
    launch += ["--mixed_precision", "no", "--main_process_port", "0", "-m", "ip_adapter_trainer", "prepare"]
    done = subprocess.run([*launch, *flags(prepare_text=True)], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "8 pictures, 8 read and 16 encodings made now, 9 captions" in done.stderr
    assert content(tmp_path / "set") == content(tmp_path / "whole")
    assert go().encoded == 0


def test_one_run_prepares_for_several_encoders(go: Callable, tmp_path: Path, encoder_folder: Path) -> None:
    other = tiny.make_encoder(tmp_path / "other", seed=2)
    both = go(more_image_encoders=other)
    assert (both.images, both.read, both.encoded) == (8, 16, 24), "latents once, features for each"
    for encoder in (encoder_folder, other):
        assert go(image_encoder_path=encoder).encoded == 0
