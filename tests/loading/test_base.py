"""Base models as people have them: other pipeline classes, other files, null parts, another VAE."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ip_adapter_trainer.cli import RUN, guarded
from ip_adapter_trainer.core.errors import Problem
from ip_adapter_trainer.families import FAMILIES
from ip_adapter_trainer.families._text import run_text_encoder
from ip_adapter_trainer.loading.base import family_of, load_base
from ip_adapter_trainer.loading.config import BaseConfig
from ip_adapter_trainer.loading.encoder import load_encoder
from tests import tiny
from tests.ldm import vae
from tests.loading.conftest import change_json, change_weights, weights_of

load = partial(load_base, dtype=torch.float32, device="cpu")
SD = (
    "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline", "LatentConsistencyModelPipeline",
    "StableDiffusionPAGPipeline", "StableDiffusionControlNetPipeline", "StableDiffusionAdapterPipeline",
)  # fmt: skip
SDXL = (
    "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline", "StableDiffusionXLPAGPipeline",
    "StableDiffusionXLControlNetPAGImg2ImgPipeline", "StableDiffusionXLControlNetUnionPipeline",
)  # fmt: skip


def index(folder: Path, **values: Any) -> None:
    change_json(folder / "model_index.json", **values)


@pytest.mark.parametrize(("kind", "name"), [("sd1", name) for name in SD] + [("sdxl", name) for name in SDXL])
def test_pipelines_of_the_same_parts_are_the_same_family(base: Callable, kind: str, name: str) -> None:
    folder = base(kind)
    index(folder, _class_name=name, controlnet=["diffusers", "ControlNetModel"], requires_aesthetics_score=True)
    assert family_of(str(folder)) == {"sd1": "sd", "sdxl": "sdxl"}[kind]
    found = load(str(folder))
    assert type(found.denoiser.pipeline).__name__ == FAMILIES[found.family].pipeline_class


def test_what_training_never_reads_is_not_asked_for(base: Callable) -> None:
    folder = base("sd1")
    index(
        folder,
        feature_extractor=["transformers", "CLIPImageProcessor"],
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        image_encoder=["transformers", "CLIPVisionModelWithProjection"],
        requires_safety_checker=True,
    )
    assert load(str(folder)).denoiser.pipeline.safety_checker is None
    for part in ("unet", "text_encoder"):
        shutil.rmtree(folder / part)
    load(str(folder), parts=("autoencoder",))


def inpainting(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    weight = tensors["conv_in.weight"]
    return tensors | {"conv_in.weight": torch.cat([weight, torch.zeros(len(weight), 5, 3, 3)], 1)}


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"in_channels": 9}, r"reads 9 channels \(inpainting\), the latents have 4"),
        ({"in_channels": 8}, r"reads 8 channels \(editing by instructions\)"),
        ({"out_channels": 8}, "predicts 8 channels"),
        ({"quantization_config": {"load_in_8bit": True}}, "is quantized, as its settings say"),
        ({"class_embed_type": "projection"}, "class_embed_type is 'projection'"),
        ({"encoder_hid_dim_type": "text_image_proj"}, "encoder_hid_dim_type"),
        ({"addition_embed_type": "text_time"}, "addition_embed_type is 'text_time', where None"),
        ({"cross_attention_dim": [64, 128]}, "one width for all blocks"),
        ({"cross_attention_dim": 128}, "reads text of width 128, the text encoders give 64"),
    ],
)
def test_a_unet_of_another_kind_is_refused_before_weights_are_read(base: Callable, values: dict, told: str) -> None:
    folder = base("sd1")
    change_json(folder / "unet/config.json", **values)
    for part in ("unet", "vae", "text_encoder"):
        weights_of(folder / part).unlink()
    with pytest.raises(Problem, match=told):
        load(str(folder))


@pytest.mark.parametrize(
    ("values", "told"), [({"in_channels": 1}, "in_channels 1"), ({"shift_factor": 0.1}, "shift_factor"),
                         ({"scaling_factor": None}, "scaling_factor is None")]
)  # fmt: skip
def test_a_vae_of_another_kind_is_refused(base: Callable, values: dict, told: str) -> None:
    folder = base("sd1")
    change_json(folder / "vae/config.json", **values)
    with pytest.raises(Problem, match=told):
        load(str(folder))


def test_text_encoders_that_changed_places_are_told(base: Callable) -> None:
    folder = base("sdxlv")
    change_json(folder / "text_encoder_2/config.json", projection_dim=64)
    with pytest.raises(Problem, match="reads pooled text of width 96, its text_encoder_2 gives 64"):
        load(str(folder))


def test_an_inpainting_unet_is_refused_by_a_whole_command(
    base: Callable, encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = base("sd1")
    change_json(folder / "unet/config.json", in_channels=9)
    change_weights(weights_of(folder / "unet"), inpainting)
    (tmp_path / "data.json").write_text(json.dumps([{"image_file": "a.png", "text": ""}] * 2))
    flags = {"pretrained_model_name_or_path": folder, "image_encoder_path": encoder,
             "data_json_file": tmp_path / "data.json", "output_dir": tmp_path / "out"}  # fmt: skip
    assert guarded(RUN["train"], [f"--{name}={value}" for name, value in flags.items()]) == 2
    assert "9 channels (inpainting)" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"])
def test_parts_that_are_null_or_others_are_refused(base: Callable, part: str) -> None:
    folder = base("sdxl")
    index(folder, **{part: [None, None]})
    with pytest.raises(Problem, match=f"the base model's {part} is null"):
        load(str(folder))
    index(folder, **{part: ["diffusers", "AutoencoderTiny"]})
    with pytest.raises(Problem, match=f"{part} is AutoencoderTiny|no family"):
        load(str(folder))


def halved(folder: Path, variant: str, *parts: str) -> None:
    for part in parts:
        file = weights_of(folder / part)
        tensors = {key: value.half() for key, value in load_file(file).items()}
        save_file(tensors, file.with_suffix(f".{variant}.safetensors"), metadata={"format": "pt"})
        file.unlink()


def test_a_folder_of_one_variant_is_taken(base: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    folder = base("sd1")
    halved(folder, "fp16", "unet", "vae", "text_encoder")
    found = load(str(folder)).denoiser.net
    assert (
        "has no plain weights of these parts: taking vae as fp16, unet as fp16, text_encoder as fp16"
        in capsys.readouterr().err
    )
    half = load_file(weights_of(folder / "unet"))
    assert found.dtype == torch.float32 and all(torch.equal(found.state_dict()[k], v.float()) for k, v in half.items())
    load(str(folder), BaseConfig(weights_variant="fp16"))
    assert capsys.readouterr().err == "", "what was asked for is not told"
    with pytest.raises(Problem, match=r"no weights \*\.fp61\.safetensors") as refused:
        load(str(folder), BaseConfig(weights_variant="fp61"))
    assert "did you mean 'fp16'?" in refused.value.fault.remedy


def test_several_variants_are_chosen_from(base: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    folder = base("sd1")
    plain = weights_of(folder / "unet")
    for variant in ("ema", "non_ema"):
        shutil.copy(plain, plain.with_suffix(f".{variant}.safetensors"))
    change_weights(plain.with_suffix(".ema.safetensors"), lambda tensors: {k: v + 1 for k, v in tensors.items()})
    own = load(str(folder)).denoiser.net.conv_in.weight
    assert capsys.readouterr().err == ""
    other = load(str(folder), BaseConfig(weights_variant="ema")).denoiser.net.conv_in.weight
    assert "has no ema weights of these parts: taking vae as plain, text_encoder as plain" in capsys.readouterr().err
    assert torch.equal(other, own + 1)
    plain.unlink()
    with pytest.raises(Problem, match="has weights in ema, non_ema"):
        load(str(folder))


def test_an_encoder_of_one_variant_is_taken(encoder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    halved(encoder.parent, "fp16", encoder.name)
    assert load_encoder(str(encoder), features=("image_embeds",), dtype=torch.float32).model.dtype == torch.float32
    assert "has no plain weights: taking the fp16 ones" in capsys.readouterr().err


def test_variant_meant_for_weights_is_told_where_it_belongs(capsys: pytest.CaptureFixture[str]) -> None:
    assert guarded(RUN["train"], ["--variant", "fp16", "--pretrained_model_name_or_path", "owner/base"]) == 2
    assert "--weights_variant fp16" in capsys.readouterr().err


def test_another_vae_is_taken(base: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, other = base("sd1"), tiny.make_base(tmp_path / "other", seed=7)
    index(folder, vae=[None, None])
    with pytest.raises(Problem, match="vae is null") as refused:
        load(str(folder))
    assert "--pretrained_vae_model_name_or_path" in refused.value.fault.remedy
    wanted = load_file(weights_of(other / "vae"))
    alone, plain = tmp_path / "alone.safetensors", tmp_path / "plain.safetensors"
    save_file({k: v.contiguous() for k, v in vae(other / "vae", prefix="").items()}, alone)
    shutil.copy(weights_of(other / "vae"), plain)
    for name in (other, other / "vae", alone, plain):
        found = load(str(folder), BaseConfig(pretrained_vae_model_name_or_path=str(name)))
        state = found.codec.autoencoder.state_dict()
        assert all(torch.equal(state[key], value) for key, value in wanted.items()), name
    assert "WARNING" not in capsys.readouterr().err
    change_json(other / "vae/config.json", scaling_factor=0.13025)
    load(str(folder), BaseConfig(pretrained_vae_model_name_or_path=str(other)))
    assert "scales latents by 0.13025, the base model's own VAE by 0.18215" in capsys.readouterr().err
    change_weights(alone, lambda tensors: {k: v for k, v in tensors.items() if k != "encoder.conv_in.bias"})
    for wrong, told in ((alone, "conv_in"), (tmp_path / "no.ckpt", "no folder"), (folder / "unet", "UNet2DCondition")):
        with pytest.raises(Problem, match=told):
            load(str(folder), BaseConfig(pretrained_vae_model_name_or_path=str(wrong)))


def test_clip_skip_counts_as_kohya_does(base_folder: Callable) -> None:
    """One is the last layer; prompts of grids and of `generate` are encoded the same way."""
    texts = ["a star", ""]
    for kind in ("sd1", "sd2v"):
        plain = load(str(base_folder(kind))).codec
        encoder = plain.pipeline.text_encoder
        states = run_text_encoder(plain.pipeline.tokenizer, encoder, texts).hidden_states
        for skip in (1, 2, 3):
            found = load(str(base_folder(kind)), BaseConfig(clip_skip=skip))
            expected = encoder.final_layer_norm(states[-skip])
            torch.testing.assert_close(found.codec.text(texts)["context"], expected)
            drawn = found.denoiser.sampling(found.codec.prompts(texts), None)["prompt_embeds"]
            torch.testing.assert_close(drawn, expected)
            assert found.codec.text_rules != plain.text_rules
        torch.testing.assert_close(
            load(str(base_folder(kind)), BaseConfig(clip_skip=1)).codec.text(texts)["context"],
            plain.text(texts)["context"],
        )
    with pytest.raises(Problem, match="has 3 layers"):
        load(str(base_folder("sd1")), BaseConfig(clip_skip=4))
    with pytest.raises(Problem, match="SDXL reads"):
        load(str(base_folder("sdxl")), BaseConfig(clip_skip=2))
