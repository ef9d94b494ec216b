"""`ip-adapter generate`: the pictures that sampling draws, under names that are free, telling how they were made."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ip_adapter_trainer.adapter_files import weights_sha256
from ip_adapter_trainer.core.errors import Problem, StorageProblem
from ip_adapter_trainer.evaluate import start
from ip_adapter_trainer.evaluate.config import GenerateConfig
from ip_adapter_trainer.evaluate.generate import generate, output_files
from ip_adapter_trainer.evaluate.sample import Sampling, image_features, sample
from ip_adapter_trainer.model import Model
from tests import tiny
from tests.evaluate.conftest import Make
from tests.evaluate.things import image


@pytest.fixture
def asked(sd1: Model, monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """What was asked of the loader, which gives the tiny model."""
    calls: list[tuple[object, ...]] = []

    def load_model(*args: object) -> Model:
        calls.append(args)
        return sd1

    monkeypatch.setattr(start, "load_model", load_model)
    return calls


def settings(folder: Path, **changes: object) -> GenerateConfig:
    names = []
    for number in (1, 2):
        names.append(str(folder / f"reference{number}.png"))
        image(number).save(names[-1])
    asked = {"adapter": "some/adapter.safetensors", "image": tuple(names), "prompt": "a star, ☂", "seed": 5,
             "num_inference_steps": 2, "num_images": 3, "batch_size": 2, "output": str(folder / "out")}  # fmt: skip
    return GenerateConfig(**(asked | {"device": "cpu"} | changes))


def test_pictures_are_the_sampled_ones_and_tell_how_they_were_made(
    sd1: Model, asked: list[tuple[object, ...]], tmp_path: Path
) -> None:
    config = settings(tmp_path, image_encoder_path="encoder")
    files = generate(config)
    assert asked == [("some/adapter.safetensors", None, "encoder", torch.float32, torch.device("cpu"), config)]
    assert [file.name for file in files] == ["0001-5.png", "0002-6.png", "0003-7.png"]
    features = image_features(sd1, [[image(1), image(2)]])
    expected = sample(sd1, features, ["a star, ☂"] * 2, [5, 6], Sampling(32, 32, steps=2))
    with Image.open(files[1]) as drawn:
        assert np.array_equal(np.asarray(drawn), np.asarray(expected[1]))
        told = {key: str(value) for key, value in drawn.text.items()}  # type: ignore[attr-defined]
    assert told.pop("Software").startswith("ip_adapter_trainer ")
    assert told == {
        "prompt": "a star, ☂", "negative_prompt": "", "image": "reference1.png, reference2.png", "seed": "6",
        "scale": "1", "guidance_scale": "7.5", "num_inference_steps": "2", "scheduler": "ddim", "size": "32x32",
        "adapter": "adapter.safetensors", "adapter_sha256": weights_sha256(sd1.adapter.published()),
    }  # fmt: skip


def test_nothing_in_a_folder_is_overwritten(asked: list[tuple[object, ...]], tmp_path: Path) -> None:
    first, second = (generate(settings(tmp_path, num_images=1)) for _ in range(2))
    assert [first[0].name, second[0].name] == ["0001-5.png", "0002-5.png"]
    assert first[0].read_bytes() == second[0].read_bytes()


def test_size_and_scale_are_as_asked(asked: list[tuple[object, ...]], tmp_path: Path) -> None:
    (file,) = generate(settings(tmp_path, num_images=1, height=48, width=40, output=str(tmp_path / "sub" / "one.png")))
    with Image.open(file) as drawn:
        assert file == tmp_path / "sub" / "one.png" and drawn.size == (40, 48)


def test_names_of_outputs(tmp_path: Path) -> None:
    assert output_files(tmp_path / "a.png", [3]) == [tmp_path / "a.png"]
    assert output_files(tmp_path / "a.png", [3, 4]) == [tmp_path / "a-3.png", tmp_path / "a-4.png"]
    (tmp_path / "0041-x.png").touch()
    assert output_files(tmp_path, [3, 4]) == [tmp_path / "0042-3.png", tmp_path / "0043-4.png"]
    (tmp_path / "v1.5").mkdir()
    assert output_files(tmp_path / "v1.5", [3]) == [tmp_path / "v1.5" / "0001-3.png"]
    with pytest.raises(Problem, match="not written as"):
        output_files(tmp_path / "a.jpg", [3])
    with pytest.raises(Problem, match="cannot make"):
        output_files(tmp_path / "0041-x.png" / "below", [3])


def test_a_full_disk_is_told(asked: list[tuple[object, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(tmp_path, num_images=1)

    def no_room(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", no_room)
    with pytest.raises(StorageProblem, match="No space left"):
        generate(config)


def test_a_picture_that_cannot_be_read_is_told_before_anything_is_loaded(
    asked: list[tuple[object, ...]], tmp_path: Path
) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    for name in ("missing.png", "broken.png"):
        with pytest.raises(Problem, match=name):
            generate(settings(tmp_path, image=(str(tmp_path / name),)))
    assert asked == []


def test_an_adapter_file_is_loaded_and_draws_as_the_live_one(
    make: Make, base_folder: Callable[[tiny.Base], Path], encoder_folder: Path, tmp_path: Path
) -> None:
    live, config = make("sdxl", "plus"), settings(tmp_path, num_images=1)
    torch.save(live.adapter.published(), tmp_path / "adapter.bin")
    frozen = {"pretrained_model_name_or_path": str(base_folder("sdxl")), "image_encoder_path": str(encoder_folder)}
    (file,) = generate(config.model_copy(update={"adapter": str(tmp_path / "adapter.bin"), **frozen}))
    features = image_features(live, [[image(1), image(2)]])
    (expected,) = sample(live, features, [config.prompt], [config.seed], Sampling(32, 32, steps=2))
    with Image.open(file) as drawn:
        assert np.array_equal(np.asarray(drawn), np.asarray(expected))


def test_the_hash_is_of_the_weights(sd1: Model) -> None:
    before = weights_sha256(sd1.adapter.published())
    assert before == weights_sha256(sd1.adapter.published()) and len(before) == 64
    with torch.no_grad():
        next(sd1.adapter.parameters()).view(-1)[0] += 1e-3
    assert weights_sha256(sd1.adapter.published()) != before


def test_devices_and_precisions(capsys: pytest.CaptureFixture[str]) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert start.choose_device("cpu") == cpu
    with pytest.raises(Problem, match="nowhere"):
        start.choose_device("nowhere")
    assert start.choose_dtype(None, cpu) == torch.float32 and start.choose_dtype(None, gpu) == torch.float16
    assert start.choose_dtype("no", gpu) == torch.float32 and start.choose_dtype("fp16", gpu) == torch.float16
    assert start.choose_dtype("fp16", cpu) == torch.bfloat16 and "bf16 instead" in capsys.readouterr().err
