"""Checkpoints in one file hold what their pipeline folders hold, and what they say of themselves is believed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ip_adapter_trainer.cli import RUN, guarded
from ip_adapter_trainer.config import parse_train
from ip_adapter_trainer.core.errors import Problem
from ip_adapter_trainer.loading.base import family_of, load_base, load_tokenizers
from ip_adapter_trainer.loading.config import BaseConfig
from tests.hub import Hub
from tests.ldm import one_file, unet
from tests.loading.conftest import change_weights, forget

load = partial(load_base, dtype=torch.float32, device="cpu")


@pytest.fixture
def checkpoint(base: Callable, tmp_path: Path) -> Callable[..., tuple[Path, BaseConfig]]:
    """Gives a tiny base in one file, and where its settings lie."""

    def make(kind: str = "sd1", **more: Any) -> tuple[Path, BaseConfig]:
        folder = base(kind)
        file = one_file(folder, tmp_path / f"{kind}.safetensors", **more)
        for weights in folder.rglob("*.safetensors"):
            weights.unlink()
        return file, BaseConfig(base_config=str(folder))

    return make


@pytest.mark.parametrize("kind", ["sd1", "sd2v", "sdxlv"])
def test_one_file_is_its_folder(checkpoint: Callable, base_folder: Callable, kind: str) -> None:
    file, config = checkpoint(kind)
    assert family_of(str(file), config=config) == ("sdxl" if kind == "sdxlv" else "sd")
    base, folder = load(str(file), config), load(str(base_folder(kind)))
    found, expected = base.denoiser.pipeline, folder.denoiser.pipeline
    for name, module in expected.components.items():
        if isinstance(module, torch.nn.Module):
            state = getattr(found, name).state_dict()
            assert all(torch.equal(state[key], value) for key, value in module.state_dict().items()), name
    theirs = type(found).from_single_file(str(file), config=str(config.base_config), local_files_only=True)
    for name in ("unet", "vae", "text_encoder"):
        own = getattr(found, name).state_dict()
        assert all(torch.equal(own[key], value) for key, value in getattr(theirs, name).state_dict().items()), name
    assert found.scheduler.config == expected.scheduler.config
    assert load(str(file), config, parts=("autoencoder",)).denoiser.net is None
    tokenizers = load_tokenizers(str(file), config)
    assert [t.get_vocab() for t in tokenizers] == [t.get_vocab() for t in folder.codec.tokenizers]


def test_what_is_no_whole_checkpoint_is_told(checkpoint: Callable, base: Callable, tmp_path: Path) -> None:
    file, config = checkpoint("sdxlv")
    tensors = load_file(file)
    for prefix, told in (
        ("conditioner.embedders.1.", "lacks a second text encoder"),
        ("conditioner.", "lacks a text encoder"),
        ("first_stage_model.", "lacks a VAE, and holds a UNet and a text encoder and a second text encoder only"),
        ("model.diffusion_model.", "lacks a UNet"),
    ):
        save_file({key: value for key, value in tensors.items() if not key.startswith(prefix)}, file)
        with pytest.raises(Problem, match=told):
            load(str(file), config)
    folder = base("sd1")
    save_file({k: v.contiguous() for k, v in unet(folder / "unet").items()}, tmp_path / "merge.safetensors")
    with pytest.raises(Problem, match="lacks a text encoder and a VAE, and holds a UNet only"):
        load(str(tmp_path / "merge.safetensors"))
    with pytest.raises(Problem, match="holds other weights") as refused:
        load(str(folder / "unet/diffusion_pytorch_model.safetensors"))
    assert str(folder) in refused.value.fault.remedy
    (tmp_path / "old.ckpt").write_bytes(b"x")
    for name, told in (("old.ckpt", r"read as \.safetensors only"), ("torn.safetensors", "cannot load the checkpoint")):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(Problem, match=told):
            load(str(tmp_path / name))


def coded(part: str, tensors: dict) -> dict:
    """The tensors of a part as codes."""
    return {key: value.to(torch.int8) if part in key else value for key, value in tensors.items()}


def test_weights_that_are_missing_or_left_over_are_told(checkpoint: Callable) -> None:
    file, config = checkpoint("sd1")
    good = file.read_bytes()
    beginning = "model.diffusion_model.middle_block"
    for name, told in (
        (f"{beginning}.1.transformer_blocks.0.attn2.to_k.weight", "the checkpoint's unet lacks 1 of"),
        ("first_stage_model.encoder.norm_out.weight", "the checkpoint's vae lacks 1 of"),
        ("cond_stage_model.transformer.text_model.encoder.layers.1.mlp.fc1.weight", "text_encoder lacks 1 of"),
    ):
        change_weights(file, lambda tensors, name=name: {k: v for k, v in tensors.items() if k != name})
        with pytest.raises(Problem, match=told):
            load(str(file), config)
        file.write_bytes(good)
    for name in (f"{beginning}.9.weight", "first_stage_model.encoder.down.9.weight"):
        change_weights(file, lambda tensors, name=name: tensors | {name: torch.ones(1)})
        with pytest.raises(Problem, match="its settings know places for"):
            load(str(file), config)
        file.write_bytes(good)
    for name in ("model_ema.decay", "first_stage_model.loss.logvar", "alphas_cumprod"):
        change_weights(file, lambda tensors, name=name: tensors | {name: torch.ones(1)})
    load(str(file), config)
    for part in ("diffusion_model", "first_stage", "cond_stage"):
        file.write_bytes(good)
        change_weights(file, partial(coded, part))
        with pytest.raises(Problem, match="is quantized"):
            load(str(file), config)


def test_a_vae_may_lie_beside_the_file(checkpoint: Callable, base_folder: Callable) -> None:
    file, config = checkpoint("sd1")
    change_weights(file, lambda t: {k: v for k, v in t.items() if not k.startswith("first_stage_model.")})
    vae = {"pretrained_vae_model_name_or_path": str(base_folder("sd1") / "vae")}
    assert load(str(file), config.model_copy(update=vae)).codec.autoencoder is not None
    flags = {"pretrained_model_name_or_path": file, "base_config": config.base_config, "data_json_file": "d"} | vae
    asked = [f"--{name}={value}" for name, value in flags.items()]
    assert parse_train([*asked, "--image_encoder_path=e"]).base_config == config.base_config


@pytest.mark.parametrize(
    ("more", "metadata", "prediction", "is_rescaled"),
    [
        ({}, {}, "epsilon", False),
        ({"v_pred": torch.ones(0)}, {}, "v_prediction", False),
        ({"v_pred": torch.ones(0), "ztsnr": torch.ones(0)}, {}, "v_prediction", True),
        ({}, {"modelspec.prediction_type": "v"}, "v_prediction", False),
        ({}, {"modelspec.prediction_type": "epsilon"}, "epsilon", False),
    ],
)
def test_a_checkpoint_is_believed_what_it_says_of_its_noise(
    checkpoint: Callable, more: dict, metadata: dict, prediction: str, is_rescaled: bool, capsys: pytest.CaptureFixture
) -> None:
    file, config = checkpoint("sd1", metadata=metadata, **more)
    found = load(str(file), config, noise={}).denoiser.pipeline.scheduler.config
    assert (found.prediction_type, bool(found.rescale_betas_zero_snr)) == (prediction, is_rescaled)
    assert found.timestep_spacing == ("trailing" if is_rescaled else "leading")
    assert ("says of itself" in capsys.readouterr().err) == bool(more or metadata)
    if not is_rescaled:
        found = load(str(file), config, noise={"prediction_type": "sample"}).denoiser.pipeline.scheduler.config
        assert found.prediction_type == "sample", "a flag has the last word"


def test_noise_that_is_not_known_is_refused(checkpoint: Callable, hub: Hub) -> None:
    file, config = checkpoint("sd1", edm_mean=torch.ones(4), edm_std=torch.ones(4))
    with pytest.raises(Problem, match="EDM's noise"):
        load(str(file), config, noise={})
    file, config = checkpoint("sd2v")
    hub.add("stable-diffusion-v1-5/stable-diffusion-v1-5", Path(str(config.base_config)))  # as diffusers takes its kind
    with pytest.raises(Problem, match=r"nothing in this SD2\.x checkpoint tells what it predicts"):
        load(str(file), noise={})
    change_weights(file, lambda tensors: tensors | {"ztsnr": torch.ones(0)})
    with pytest.raises(Problem, match=r"nothing in this SD2\.x checkpoint"):
        load(str(file), noise={})
    change_weights(file, lambda tensors: {key: value for key, value in tensors.items() if key != "ztsnr"})
    found = load(str(file), noise={"prediction_type": "epsilon"})
    assert found.denoiser.pipeline.scheduler.config.prediction_type == "epsilon"
    load(str(file), config, noise={})  # settings that the user named tell


def test_settings_come_from_the_hub_where_none_are_named(checkpoint: Callable, hub: Hub) -> None:
    file, config = checkpoint("sd1")
    with pytest.raises(Problem, match="settings of the base model: no folder stable-diffusion-v1-5") as refused:
        load(str(file))
    assert "--base_config" in refused.value.fault.remedy
    hub.add("stable-diffusion-v1-5/stable-diffusion-v1-5", Path(str(config.base_config)))
    forget()
    assert load(str(file)).family == "sd"


def test_flags_that_would_do_nothing_are_refused(checkpoint: Callable, base_folder: Callable) -> None:
    file, config = checkpoint("sd1")
    for name, asked in (
        (file, config.model_copy(update={"weights_variant": "fp16"})),
        (file, config.model_copy(update={"revision": "main"})),
        (base_folder("sd1"), BaseConfig(base_config="x/y")),
        (base_folder("sd1"), BaseConfig(revision="main")),
    ):
        with pytest.raises(Problem, match="is for a base model that is") as refused:
            load(str(name), asked)
        assert refused.value.fault.remedy.startswith("leave --")


def test_an_adapter_of_one_file_is_trained_exported_and_drawn_with(
    checkpoint: Callable, encoder: Path, rows_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The adapter remembers how its base model was loaded; its file and settings may move together with a flag."""
    file, config = checkpoint("sdxlv", v_pred=torch.ones(0), ztsnr=torch.ones(0))
    run, out = tmp_path / "run", tmp_path / "adapter.safetensors"
    flags = {
        "pretrained_model_name_or_path": file, "base_config": config.base_config, "image_encoder_path": encoder,
        "data_json_file": rows_folder / "data.json", "data_root_path": rows_folder / "images", "output_dir": run,
        "resolution": 32, "train_batch_size": 2, "max_train_steps": 1, "report_to": "none", "grid_rows": 1,
        "grid_steps": 1, "num_validation_images": 0,
    }  # fmt: skip
    assert guarded(RUN["train"], [f"--{name}={value}" for name, value in flags.items()]) == 0
    assert "predicting v_prediction" in capsys.readouterr().err
    assert guarded(RUN["export"], [str(run), "-o", str(out)]) == 0
    draw = ["--adapter", str(out), "--image", str(rows_folder / "images/00000.png"), "--num_inference_steps", "2"]
    assert guarded(RUN["generate"], [*draw, "-o", str(tmp_path / "a.png")]) == 0
    moved = shutil.move(str(config.base_config), tmp_path / "moved")
    assert guarded(RUN["generate"], [*draw, "-o", str(tmp_path / "b.png")]) == 2
    assert "named by" in capsys.readouterr().err
    again = [*draw, "-o", str(tmp_path / "b.png"), "--base_config", str(moved)]
    assert guarded(RUN["generate"], again) == 0, capsys.readouterr().err
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
