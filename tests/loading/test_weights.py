"""Every frozen part is whole, or refused with its name, its file and what is wrong with it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BertConfig, BertModel, Siglip2VisionConfig, Siglip2VisionModel, ViTConfig, ViTModel

from ip_adapter_trainer.core.errors import Problem
from ip_adapter_trainer.loading.base import load_base
from ip_adapter_trainer.loading.config import BaseConfig
from ip_adapter_trainer.loading.encoder import load_encoder, load_scorer
from ip_adapter_trainer.pocket import models
from tests import tiny
from tests.loading.conftest import Change, change_json, change_weights, weights_of

PARTS = ("unet", "vae", "text_encoder", "text_encoder_2", "encoder", "scorer")
LAST = {  # a weight of each part
    "unet": "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight", "vae": "encoder.conv_out.bias",
    "text_encoder": "final_layer_norm.bias", "text_encoder_2": "text_projection.weight",
    "encoder": "vision_model.post_layernorm.bias", "scorer": "visual_projection.weight",
}  # fmt: skip
TOLD = {"encoder": "the image encoder", "scorer": "the CLIP model that scores"}
Load = Callable[[], Any]


@pytest.fixture
def loads(base: Callable[[str], Path], encoder: Path, scorer: Path) -> Callable[[str], tuple[Path, Load]]:
    """Gives a part's folder, and what loads it and gives the module."""

    def of(part: str) -> tuple[Path, Load]:
        if part == "encoder":
            return encoder, lambda: load_encoder(str(encoder), features=tiny.FEATURES, dtype=torch.float32).model
        if part == "scorer":
            return scorer, lambda: load_scorer(str(scorer))[0]
        folder = base("sdxl")
        load = partial(load_base, str(folder), dtype=torch.float32, device="cpu")
        return folder / part, lambda: load().denoiser.pipeline.components[part]

    return of


def without(name: str) -> Change:
    return lambda tensors: {key: value for key, value in tensors.items() if not key.endswith(name)}


def cut(name: str) -> Change:
    return lambda tensors: {k: v[: v.shape[0] // 2] if k.endswith(name) else v for k, v in tensors.items()}


def with_another(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors | {"layers.99.weight": torch.ones(2)}


def codes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.to(torch.int8) if value.ndim == 2 else value for key, value in tensors.items()}


@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_is_not_whole_is_refused(loads: Callable, part: str) -> None:
    folder, load = loads(part)
    file, name = weights_of(folder), LAST[part]
    good, names = file.read_bytes(), load().state_dict()
    damages: dict[str, Change] = {
        rf"lacks 1 of {len(names)} weights: \S*{re.escape(name)}": without(name),
        rf"lacks {len(names)} of {len(names)} weights: .* and {len(names) - 3} more": lambda _: {
            "other": torch.ones(1)
        },
        rf"1 of {len(names)} weights in other shapes than its config.json says: \S*{re.escape(name)} is": cut(name),
        "1 weights that its config.json knows no place for: layers.99.weight": with_another,
        "is quantized": codes,
    }
    for told, damage in damages.items():
        change_weights(file, damage)
        with pytest.raises(Problem, match=told) as refused:
            load()
        said = str(refused.value)
        assert TOLD.get(part, f"the base model's {part}") in said and str(file) in said and refused.value.fault.remedy
        file.write_bytes(good)
    file.write_bytes(good[: len(good) // 2])
    with pytest.raises(Problem, match="damaged"):
        load()
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(Problem, match="pointer of Git LFS"):
        load()
    file.unlink()
    with pytest.raises(Problem, match=r"no weights in \.safetensors files"):
        load()


@pytest.mark.parametrize("part", PARTS)
def test_names_that_carry_a_wrappers_prefix_are_mended(
    loads: Callable, part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, load = loads(part)
    whole, file = load().state_dict(), weights_of(folder)
    good = load_file(file)
    for prefix in ("_orig_mod.", "module.", "base_model.model.", "module._orig_mod."):
        save_file({prefix + key: value for key, value in good.items()}, file)
        found = load().state_dict()
        assert found.keys() == whole.keys() and all(torch.equal(found[key], whole[key]) for key in whole)
        assert f"carry a wrapper's prefix ({prefix}" in capsys.readouterr().err
    save_file({f"_orig_mod.{key}": value for key, value in without(LAST[part])(good).items()}, file)
    with pytest.raises(Problem, match="lacks 1 of"):
        load()


def test_names_wrapped_block_by_block_are_mended(loads: Callable) -> None:
    folder, load = loads("unet")
    whole, file = load().state_dict(), weights_of(folder)
    save_file({re.sub(r"(blocks\.\d+\.)", r"\1_orig_mod.", key): v for key, v in load_file(file).items()}, file)
    assert all(torch.equal(value, whole[key]) for key, value in load().state_dict().items())


def test_shards_are_whole_too(loads: Callable) -> None:
    folder, load = loads("unet")
    whole, file = load().state_dict(), weights_of(folder)
    tensors = load_file(file)
    file.unlink()
    names = sorted(tensors)
    parts = {"diffusion_pytorch_model-00001-of-00002.safetensors": names[::2],
             "diffusion_pytorch_model-00002-of-00002.safetensors": names[1::2]}  # fmt: skip
    for shard, keys in parts.items():
        save_file({key: tensors[key] for key in keys}, folder / shard)
    index = {"metadata": {}, "weight_map": {key: shard for shard, keys in parts.items() for key in keys}}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    assert all(torch.equal(value, whole[key]) for key, value in load().state_dict().items())
    for shard in parts:  # the index lists what the shard has not
        change_weights(folder / shard, without(LAST["unet"]))
    with pytest.raises(Problem, match=f"lacks 1 of .*{LAST['unet']}"):
        load()
    (folder / shard).unlink()
    with pytest.raises(Problem, match="files that are not beside it"):
        load()


def test_what_penultimate_features_do_not_read_need_not_be_there(
    encoder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load = partial(load_encoder, str(encoder), dtype=torch.float32)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    whole = load(features=tiny.FEATURES).encode(pixels, PATCHES)["penultimate"]
    with_layer_too_many = encoder / "config.json"
    good = with_layer_too_many.read_text()
    change_json(with_layer_too_many, num_hidden_layers=4)
    with pytest.raises(Problem, match="lacks 16 of"):
        load(features=PATCHES)
    with_layer_too_many.write_text(good)
    for name in ("visual_projection.weight", "post_layernorm.weight", "post_layernorm.bias", "layers.2.mlp.fc1.weight"):
        change_weights(weights_of(encoder), without(name))
        found = load(features=PATCHES)
        assert torch.equal(found.encode(pixels, PATCHES)["penultimate"], whole)
        again = load(features=PATCHES).model.state_dict()
        assert all(torch.equal(value, again[key]) for key, value in found.model.state_dict().items()), "made up anew"
    assert "which nothing reads here" in capsys.readouterr().err
    with pytest.raises(Problem, match="lacks 4 of"):
        load(features=tiny.FEATURES)
    change_weights(weights_of(encoder), without("layers.1.mlp.fc1.weight"))
    with pytest.raises(Problem, match="lacks 1 of"):
        load(features=PATCHES)


def test_both_halves_of_clip_serve_as_the_one_that_sees(scorer: Path, encoder: Path) -> None:
    found = load_encoder(str(scorer), features=tiny.FEATURES, dtype=torch.float32).model.state_dict()
    both = load_file(weights_of(scorer))
    assert all(torch.equal(value, both[key]) for key, value in found.items())


SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
PATCHES = ("penultimate",)
SEES = SMALL | {"image_size": 32, "patch_size": 8}


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (lambda: ViTModel(ViTConfig(**SEES)), "ViTModel"),
        (lambda: Siglip2VisionModel(Siglip2VisionConfig(**SMALL, patch_size=8)), "Siglip2VisionModel"),
        (lambda: BertModel(BertConfig(**SMALL, vocab_size=20)), "BertModel"),
    ],
    ids=["vit", "siglip2_of_any_size", "bert"],
)
def test_an_encoder_of_another_kind_is_named(tmp_path: Path, model: Callable[[], Any], told: str) -> None:
    model().save_pretrained(tmp_path)
    with pytest.raises(Problem, match=f"the image encoder is a {told}"):
        load_encoder(str(tmp_path), features=tiny.FEATURES, dtype=torch.float32)
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 48, "num_hidden_layers": 1}))
    with pytest.raises(Problem, match="the image encoder"):
        load_encoder(str(tmp_path), features=tiny.FEATURES, dtype=torch.float32)


def test_open_clips_layout_and_bare_files_are_named(tmp_path: Path, encoder: Path) -> None:
    save_file({"visual.conv1.weight": torch.ones(1)}, tmp_path / "open_clip_model.safetensors")
    (tmp_path / "open_clip_config.json").write_text("{}")
    with pytest.raises(Problem, match="open_clip's own layout"):
        load_encoder(str(tmp_path), features=tiny.FEATURES, dtype=torch.float32)
    with pytest.raises(Problem, match="is a folder, and this is a file"):
        load_encoder(str(weights_of(encoder)), features=tiny.FEATURES, dtype=torch.float32)


def test_an_encoder_within_a_folder_is_found(encoder: Path, tmp_path: Path) -> None:
    (tmp_path / "repository" / "models").mkdir(parents=True)
    encoder.rename(tmp_path / "repository" / "models" / "image_encoder")
    load = partial(load_encoder, features=tiny.FEATURES, dtype=torch.float32)
    with pytest.raises(Problem, match="--image_encoder_subfolder: models/image_encoder"):
        load(str(tmp_path / "repository"))
    load(str(tmp_path / "repository" / "models"))
    load(str(tmp_path / "repository"), BaseConfig(image_encoder_subfolder="models/image_encoder"))


def empty(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


def without_merges(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["merges"] = []
    (folder / "tokenizer.json").write_text(json.dumps(content))


def as_vocabulary(folder: Path) -> None:
    """As SD1.x has it, the merges forgotten."""
    content = json.loads((folder / "tokenizer.json").read_text())
    (folder / "vocab.json").write_text(json.dumps(content["model"]["vocab"]))
    (folder / "tokenizer.json").unlink()


def short(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    kept = {word: number for word, number in vocab.items() if number < 530 or number >= len(vocab) - 2}
    content["model"] |= {"vocab": kept, "merges": []}
    (folder / "tokenizer.json").write_text(json.dumps(content))


def reversed_words(folder: Path) -> None:
    """As that of another encoder, with as many words."""
    content = json.loads((folder / "tokenizer.json").read_text())
    vocab, added = content["model"]["vocab"], content["added_tokens"]
    last = len(vocab) - 1
    content["model"]["vocab"] = {word: last - number for word, number in vocab.items()}
    content["added_tokens"] = [token | {"id": last - token["id"]} for token in added]
    (folder / "tokenizer.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (reversed_words, "it is another one's"),
        (lambda folder: change_json(folder.parent / "text_encoder/config.json", vocab_size=None), "vocab_size None"),
        (empty, "words, the text encoder"),
        (without_merges, "its merges are missing"),
        (as_vocabulary, "cannot load the base model's tokenizer"),
        (short, "words, the text encoder"),
        (lambda folder: (folder / "tokenizer_config.json").unlink(), "its tokenizer_config.json is missing"),
        (lambda folder: change_json(folder / "tokenizer_config.json", model_max_length=77), "of 77 tokens"),
        (lambda folder: folder.rename(folder.with_name("elsewhere")), "no such folder"),
        (lambda folder: change_json(folder.parent / "text_encoder/config.json", vocab_size=900), "words, the text enc"),
    ],
)
def test_a_tokenizer_without_its_words_is_refused(base: Callable, damage: Callable[[Path], Any], told: str) -> None:
    folder = base("sd1")
    damage(folder / "tokenizer")
    with pytest.raises(Problem, match=told) as refused:
        load_base(str(folder), dtype=torch.float32, device="cpu")
    assert "the base model's tokenizer" in str(refused.value) and "tokenizer_config.json" in refused.value.fault.remedy


def test_the_scorers_tokenizer_is_whole_too(scorer: Path) -> None:
    without_merges(scorer)
    with pytest.raises(Problem, match="its merges are missing"):
        load_scorer(str(scorer))
    models.tokenizer().save_pretrained(scorer)
    load_scorer(str(scorer))
    change_json(scorer / "preprocessor_config.json", crop_size={"height": 16, "width": 16})
    with pytest.raises(Problem, match="takes images of 32 px, its preprocessor makes 16 x 16"):
        load_scorer(str(scorer))
    (scorer / "preprocessor_config.json").unlink()
    with pytest.raises(Problem, match="CLIP model that scores"):
        load_scorer(str(scorer))
