"""Paths are never asked of the hub; hub ids bring what is needed of them, and tell why when they cannot."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from ip_adapter_trainer.core.errors import Problem
from ip_adapter_trainer.loading import hub as loading_hub
from ip_adapter_trainer.loading.base import family_of, load_base, load_tokenizers
from ip_adapter_trainer.loading.config import BaseConfig
from ip_adapter_trainer.loading.encoder import load_encoder
from tests import tiny
from tests.hub import Hub
from tests.ldm import one_file
from tests.loading.conftest import forget, weights_of

load = partial(load_base, dtype=torch.float32, device="cpu")


@pytest.mark.parametrize(
    "name", ["/no/where", "~nobody/x", "n" * 300, "./here", "~/there", "bare", "a/b/c", "models/x", "with space/name"]
)
def test_a_path_that_does_not_exist_is_told_at_once(
    hub: Hub, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.is_silent = True
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    began = time.monotonic()
    with pytest.raises(Problem, match=f"the base model: no folder {name} here"):
        load(name)
    assert time.monotonic() - began < 1


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("models/imge_encoder", "did you mean models/image_encoder?"),
        ("modles/image_encoder", "did you mean models/image_encoder?"),
        ("./models/sd-15", "did you mean models/sd15?"),
        ("models/other", "models holds image_encoder, sd15"),
    ],
)
def test_the_nearest_path_is_named(name: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("image_encoder", "sd15"):
        (tmp_path / "models" / folder).mkdir(parents=True)
    with pytest.raises(Problem) as refused:
        loading_hub.find(f"./{name}".replace("././", "./"), "it", list)
    assert told in refused.value.fault.remedy


def test_a_base_model_on_the_hub_brings_what_is_needed_of_it(hub: Hub, base: Callable, base_folder: Callable) -> None:
    folder = base("sd1")
    (folder / "safety_checker").mkdir()
    shutil.copy(folder / "vae/config.json", folder / "safety_checker/model.safetensors")
    shutil.copy(weights_of(folder / "unet"), folder / "unet/diffusion_pytorch_model.fp16.safetensors")
    shutil.copy(weights_of(folder / "vae"), folder / "all-in-one.safetensors")
    hub.add("owner/base", folder)
    assert family_of("owner/base") == "sd" and len(load_tokenizers("owner/base", BaseConfig())) == 1
    assert not [name for name in hub.asked if name.endswith(".safetensors")]
    found = load("owner/base/").denoiser.net.state_dict()  # the published command lines end names with a slash
    own = load(str(base_folder("sd1"))).denoiser.net.state_dict()
    assert all(torch.equal(value, own[key]) for key, value in found.items())
    brought = sorted(name.removeprefix("owner/base/") for name in hub.asked if name.endswith(".safetensors"))
    assert brought == ["text_encoder/model.safetensors", "unet/diffusion_pytorch_model.safetensors",
                       "vae/diffusion_pytorch_model.safetensors"]  # fmt: skip
    hub.asked.clear()
    load("owner/base")
    assert hub.asked == [], "what was brought before lies in the cache"


def test_one_variant_and_one_revision_are_brought(hub: Hub, base: Callable) -> None:
    folder = base("sd1")
    for part in ("unet", "vae", "text_encoder"):
        plain = weights_of(folder / part)
        shutil.copy(plain, plain.with_suffix(".fp16.safetensors"))
    hub.add("owner/base", base("sd2v"))
    hub.add("owner/base", folder, revision="v2")
    found = load("owner/base", BaseConfig(revision="v2", weights_variant="fp16"))
    assert found.denoiser.context_dim == 64, "that of the other revision is 128"
    weights = [name for name in hub.asked if name.endswith(".safetensors")]
    assert len(weights) == 3 and all(name.endswith(".fp16.safetensors") for name in weights)
    with pytest.raises(Problem, match="owner/base has no revision 'v3'"):
        load("owner/base", BaseConfig(revision="v3"))


@pytest.mark.parametrize("inner", ["models/image_encoder", "image_encoder", ""])
def test_an_encoder_lies_in_a_folder_of_a_repository(hub: Hub, encoder: Path, tmp_path: Path, inner: str) -> None:
    place = tmp_path / "repository" / inner
    place.parent.mkdir(parents=True, exist_ok=True)
    encoder.rename(place)
    hub.add("h94/IP-Adapter", tmp_path / "repository")
    get = partial(load_encoder, features=tiny.FEATURES, dtype=torch.float32)
    name = f"h94/IP-Adapter/{inner}".rstrip("/")
    assert get(name).name == name
    get("h94/IP-Adapter", BaseConfig(image_encoder_subfolder=inner or None))
    if inner == "models/image_encoder":
        with pytest.raises(Problem, match="--image_encoder_subfolder: models/image_encoder"):
            get("h94/IP-Adapter")
        with pytest.raises(Problem, match=r"no config\.json"):
            get("h94/IP-Adapter/models/imageencoder")
    assert len([name for name in hub.asked if name.endswith(".safetensors")]) == 1


def test_refusals_of_the_hub_are_told_apart(hub: Hub, base_folder: Callable) -> None:
    hub.add("owner/gated", base_folder("sd1"))
    hub.gated.add("owner/gated")
    (checkpoint := base_folder("sd1").parent / "only-a-checkpoint").mkdir(exist_ok=True)
    (checkpoint / "merge.safetensors").write_bytes(b"x")
    hub.add("owner/checkpoint", checkpoint)
    for name, told, remedy in (
        ("owner/checkpoint", "has nothing that is read here", "download one of its files and give that: merge.safet"),
        ("owner/none", "no folder owner/none here, and the hub has no owner/none", "check the name"),
        (
            "runwayml/stable-diffusion-v1-5",
            "the hub has no runwayml",
            "a copy is stable-diffusion-v1-5/stable-diffusion-v1-5",
        ),
        ("owner/gated", "not open to all", "HF_TOKEN"),
        (f"{hub.address}/owner/gated", "web addresses are not read", "owner/name"),
    ):
        with pytest.raises(Problem, match=told) as refused:
            load(name)
        assert remedy in refused.value.fault.remedy


def test_a_hub_that_cannot_be_asked_is_told_and_its_copies_are_used(
    hub: Hub, base_folder: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.add("owner/base", base_folder("sd1"))
    load("owner/base")
    forget()
    hub.is_silent = True
    load("owner/base")
    assert "the hub cannot be asked about owner/base: taking the copy" in capsys.readouterr().err
    with pytest.raises(
        Problem, match=r"no folder owner/other here, and the hub cannot be reached: (no answer in 2 s|timed out)"
    ):
        load("owner/other")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    forget()
    load("owner/base")
    with pytest.raises(Problem, match="not to be asked"):
        load("owner/other")


def test_a_half_brought_copy_is_not_taken_for_whole(hub: Hub, base_folder: Callable) -> None:
    hub.add("owner/base", base_folder("sd1"))
    assert family_of("owner/base") == "sd", "this brings settings only"
    forget()
    hub.is_silent = True
    with pytest.raises(Problem, match=r"no weights in \.safetensors files"):
        load("owner/base")


def test_commands_tell_of_a_silent_hub_in_seconds(hub: Hub, tmp_path: Path, encoder: Path) -> None:
    """A whole command: the 5 s are for the hub, the rest for starting Python on a busy machine."""
    hub.is_silent = True
    flags = {"image_encoder_path": encoder, "data_json_file": tmp_path / "data.json", "output_dir": tmp_path / "out"}
    (tmp_path / "data.json").write_text(json.dumps([{"image_file": "a.png", "text": ""}] * 2))
    command = [sys.executable, "-m", "ip_adapter_trainer", "train", "--pretrained_model_name_or_path=owner/base"]
    began = time.monotonic()
    environment = os.environ | hub.environment(tmp_path / "cache")
    done = subprocess.run(
        [*command, *(f"--{k}={v}" for k, v in flags.items())], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2 and "the hub cannot be reached" in done.stderr, done.stderr
    assert time.monotonic() - began < 30


def test_a_folder_that_is_no_pipeline_is_told_with_what_is_near(base: Callable, tmp_path: Path) -> None:
    folder = base("sd1")
    for wrong in (tmp_path, folder / "unet"):
        with pytest.raises(Problem, match="cannot read model_index") as refused:
            load(str(wrong))
        assert f"did you mean {folder}?" in refused.value.fault.remedy
    one_file(folder, tmp_path / "whole.safetensors")
    weights_of(folder / "vae").rename(tmp_path / "a-vae.safetensors")
    (folder / "model_index.json").unlink()
    with pytest.raises(Problem, match="cannot read model_index") as refused:
        load(str(tmp_path))
    assert f"did you mean {tmp_path / 'whole.safetensors'}?" in refused.value.fault.remedy
    (folder / "model_index.json").write_text("[]")
    with pytest.raises(Problem, match="cannot read the settings"):
        load(str(folder))
