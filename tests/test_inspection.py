"""What inspect says of published sizes, of other makers' files, and of each reader."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ip_adapter_trainer.adapter_files import (
    AdapterCard,
    AdapterFile,
    fitting_config,
    flags_to_fit,
    read_adapter,
    refusals,
    write_adapter,
)
from ip_adapter_trainer.adapter_files.file import foreign_of
from ip_adapter_trainer.adapter_files.guess import _SD_WIDTHS, _SDXL_WIDTHS, base_guess, encoder_guess
from ip_adapter_trainer.adapter_files.raw import RawFile
from ip_adapter_trainer.adapters import VARIANTS
from ip_adapter_trainer.card import card_of
from ip_adapter_trainer.config import parse
from ip_adapter_trainer.core.errors import Problem
from ip_adapter_trainer.inspection import InspectConfig, examine, inspect
from ip_adapter_trainer.layouts import make_layout
from ip_adapter_trainer.loading.adapter import read_adapter_into
from ip_adapter_trainer.train import checkpoint
from tests.published import Trained
from tests.test_model import build

UNET = make_layout("unet")


def pairs(context_dim: int, layers: int | None = None) -> dict[str, Tensor]:
    """The pairs of SD or SDXL at their real sizes, without memory; `layers` keeps the first ones."""
    widths = _SDXL_WIDTHS if context_dim == 2048 else _SD_WIDTHS
    return {
        f"{2 * i + 1}.to_{x}_ip.weight": torch.empty(width, context_dim, device="meta")
        for i, width in enumerate(widths[:layers])
        for x in "kv"
    }


def published(
    variant: str, context_dim: int, feature_dim: int, layers: int | None = None, **config: Any
) -> AdapterFile:
    """An adapter of real size, without memory."""
    kind = VARIANTS[variant]
    settings = kind.Config(**config)
    with torch.device("meta"):
        projector = kind.projector(settings, dict.fromkeys(kind.needs, (257, feature_dim)), context_dim)
    tables = dict(projector.state_dict()), pairs(context_dim, layers)
    named: dict[str, Any] = {"metadata": {}, "card": None, "layout": UNET, "layers": {}}
    return AdapterFile(Path("a.safetensors"), "published", "safetensors", *tables, **named)


def count(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values())


@pytest.mark.parametrize(
    "variant, context_dim, feature_dim, projector, layers",
    [
        ("base", 768, 1024, 3_150_336, 19_169_280),
        ("base", 2048, 1280, 10_498_048, 340_787_200),
        ("plus", 768, 1280, 29_918_208, 19_169_280),
        ("plus", 2048, 1280, 82_961_664, 340_787_200),
        ("full", 768, 1280, 2_625_024, 19_169_280),
    ],
)
def test_published_adapters_have_the_published_sizes_and_every_reader_takes_them(
    variant: str, context_dim: int, feature_dim: int, projector: int, layers: int
) -> None:
    file = published(variant, context_dim, feature_dim)
    assert (count(file.image_proj), count(file.ip_adapter)) == (projector, layers)
    assert file.variant is VARIANTS[variant] and refusals(file) == {}


@pytest.mark.parametrize(
    "file, readers, why",
    [
        (published("plus", 768, 1280, num_tokens=32), {"comfy"}, "builds 16 tokens"),
        (published("plus", 768, 1280, resampler_heads=16), {"original", "comfy"}, "768 wide of 12 heads"),
        (published("plus", 768, 1280, resampler_dim=512), {"original", "comfy"}, "768 wide of 12 heads"),
        (published("plus", 2048, 1024, resampler_dim=2048, resampler_heads=12), {"original"}, "1280 wide of 20"),
        (published("full", 2048, 1280), {"original", "comfy"}, "Full"),
        (published("base", 768, 1024, layers=12), {"comfy"}, "with 16 layers, the file has 12"),
        (published("base", 1024, 1024), set(), ""),
        (published("plus", 1024, 1280), set(), ""),
    ],
)
def test_what_a_reader_builds_otherwise_it_refuses(file: AdapterFile, readers: set[str], why: str) -> None:
    found = refusals(file)
    assert found.keys() == readers and all(why in reason for reason in found.values())


def changed(file: AdapterFile, image_proj: dict[str, Tensor], **fields: Any) -> AdapterFile:
    values = {name: getattr(file, name) for name in AdapterFile.__dataclass_fields__}
    return AdapterFile(**{**values, "image_proj": {**file.image_proj, **image_proj}, **fields})


def test_what_every_reader_builds_otherwise_all_refuse() -> None:
    plus, base = published("plus", 768, 1280), published("base", 768, 1024)
    fifth = {k.replace("layers.3.", "layers.4."): t for k, t in plus.image_proj.items() if "layers.3." in k}
    gap = {name: tensor for name, tensor in base.ip_adapter.items() if not name.startswith("5.")}
    wide = torch.empty(8 * 768, 1024, device="meta")
    for file, why in (
        (changed(plus, fifth), "depth 4, the file has 5"),
        (changed(plus, {"pos_emb.weight": torch.empty(257, 1280)}), "position embedding"),
        (changed(base, {}, ip_adapter=gap), r"looks for 5.to_k_ip.weight"),
        (changed(base, {}, origin="checkpoint"), "takes no training checkpoint"),
    ):
        found = refusals(file)
        assert found.keys() == {"diffusers", "original", "comfy"} and all(why in reason for reason in found.values())
    assert refusals(changed(base, {"proj.weight": wide})).keys() == {"diffusers", "comfy"}
    assert refusals(changed(base, {}, origin="comfy")).keys() == {"diffusers", "original"}
    for path in ("my-unnorm.bin", "all/Unnorm-faces/a.bin"):
        assert refusals(changed(base, {}, path=Path(path))).keys() == {"comfy"}


def test_guesses_say_how_certain_they_are() -> None:
    assert base_guess(768, _SD_WIDTHS).startswith("SD1.x (certain")
    assert base_guess(1024, _SD_WIDTHS).startswith("SD2.x (certain")
    assert base_guess(2048, _SDXL_WIDTHS).startswith("SDXL (certain")
    assert base_guess(768, [320] * 16).startswith("SD1.x (likely")
    assert base_guess(768, [320] * 4) == "unknown (4 layers, tokens 768 wide)"
    for feature, width, name in (
        ("image_embeds", 1024, "ViT-H/14"), ("image_embeds", 1280, "bigG"), ("image_embeds", 768, "ViT-L"),
        ("penultimate", 1280, "ViT-H/14"), ("penultimate", 1664, "bigG"), ("penultimate", 1024, "ViT-L"),
    ):  # fmt: skip
        assert "likely" in encoder_guess(feature, width) and name in encoder_guess(feature, width)
    assert encoder_guess("penultimate", 48) == "unknown (penultimate, 48 wide)"


@pytest.fixture
def run_folder(base_folder: Callable, encoder_folder: Path, tmp_path: Path) -> Path:
    """A run with one checkpoint of a tiny Plus adapter."""
    model = build(base_folder("sd1"), encoder_folder, "plus")
    card = card_of(model, base="a/base", step=1234, images_seen=9, loaded_with={"clip_skip": 2})
    checkpoint.write(tmp_path, checkpoint.take(1234, model.adapter.state_dict(), card, {}))
    return tmp_path


def test_a_checkpoint_is_told_as_text_and_as_json(run_folder: Path) -> None:
    text = inspect(InspectConfig(path=str(run_folder)))
    for part in ("training checkpoint", "plus", "unknown (4 layers, tokens 64 wide)", "1,234", "a/base", "float32"):
        assert part in text
    assert "its frozen models were loaded with clip_skip 2" in text
    assert text.count("takes no training checkpoint; export it") == 3
    told = json.loads(inspect(parse(InspectConfig, [str(run_folder), "--json"], prog="inspect")))
    assert told["layers"] == [1, 3, 5, 7] and told["tokens"] == 16 and told["steps"] == 1234
    assert told["readers"].keys() == {"diffusers", "original", "comfy"}


def test_a_real_file_is_told_with_what_its_readers_must_know(tmp_path: Path) -> None:
    file = published("full", 768, 1280)
    tables = {
        table: {n: torch.zeros(t.shape, dtype=torch.float16) for n, t in ts.items()}
        for table, ts in file.tables.items()
    }
    write_adapter(tmp_path / "a.safetensors", tables, {"note": "line\x1b[2J\nbreak", "long": "x" * 999}, UNET)
    report = examine(tmp_path / "a.safetensors")
    assert sum(report.parameters.values()) == 21_794_304 and report.dtypes == ["float16"] and report.tokens is None
    assert report.readers == {"diffusers": None, "original": None, "comfy": None}
    assert any("num_tokens=" in r and "257" in r and "without it, the file loads" in r for r in report.remarks)
    assert any("ip-adapter-full-face_sd15" in remark for remark in report.remarks)
    assert "line\\x1b[2J\\nbreak" in str(report) and "x" * 201 not in str(report)


def test_a_spoiled_checkpoint_is_told_as_one(base_folder: Callable, encoder_folder: Path, tmp_path: Path) -> None:
    model = build(base_folder("sd1"), encoder_folder, "base")
    Trained(model.denoiser.net, model.adapter.image_proj_model).save(tmp_path / "model.safetensors")
    report = examine(tmp_path)
    assert "lost its adapter_modules" in report.layout and report.layers == [1, 3, 5, 7]


def face_mlp(tokens: int = 4) -> dict[str, tuple[int, ...]]:
    return {"proj.0.weight": (16, 8), "proj.2.weight": (tokens * 8, 16), "norm.weight": (8,)}


PAIR = {"1.to_k_ip.weight": (8, 8), "1.to_v_ip.weight": (8, 8)}
LORA = {"0.to_q_lora.down.weight": (4, 8), **PAIR}
PERCEIVER = {"perceiver_resampler.proj_in.weight": (8, 8)}
RESAMPLER = {"latents": (1, 16, 1280), "proj_in.weight": (1280, 512), "proj_out.weight": (2048, 1280)}
TIMED = {"latents": (1, 64, 8), "time_embedding.linear_1.weight": (8, 8)}
GLOBAL = {"proj.weight": (32, 8), "norm.weight": (8,)}
FOREIGN: dict[str, tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]], int, set[str]]] = {
    "FaceID": (face_mlp(), LORA, 4, set()),
    "FaceID-Plus": (face_mlp() | PERCEIVER, LORA, 4, set()),
    "FaceID-Portrait": (face_mlp(16), PAIR, 16, set()),
    "InstantID, or Portrait of un-normalised embeddings": (RESAMPLER, PAIR, 16, {"original", "comfy"}),
    "SD3.5, InstantX": (TIMED, {"0.to_k_ip.weight": (8, 8)}, 64, {"original", "comfy"}),
    "FLUX, InstantX": (face_mlp(128), {"0.to_k_ip.weight": (8, 8)}, 128, {"diffusers", "original", "comfy"}),
    "FLUX, XLabs in diffusers' layout": (GLOBAL, {"0.to_k_ip.bias": (8,)}, 4, {"original", "comfy"}),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_other_kinds_are_named_and_said_not_to_be_trained(name: str, tmp_path: Path) -> None:
    projector, attention, tokens, refused = FOREIGN[name]
    content = {
        "image_proj": {key: torch.zeros(shape) for key, shape in projector.items()},
        "ip_adapter": {key: torch.zeros(shape) for key, shape in attention.items()},
    }
    torch.save(content, tmp_path / "a.bin")
    report = examine(tmp_path / "a.bin")
    assert report.variant == f"{name}: recognised, this trainer does not train it yet"
    assert report.tokens == tokens and {r for r, why in report.readers.items() if why} == refused
    assert name in str(report) and report.start_refusal
    with pytest.raises(Problem):  # training does not start from it either
        read_adapter(tmp_path / "a.bin")


def test_comfy_tells_some_face_adapters_by_the_whole_path(tmp_path: Path) -> None:
    path = tmp_path / "unnorm" / "a.safetensors"
    path.parent.mkdir()
    projector = {f"image_proj.{name}": torch.zeros(shape) for name, shape in RESAMPLER.items()}
    save_file(projector | {f"ip_adapter.{name}": torch.zeros(shape) for name, shape in PAIR.items()}, path)
    assert examine(path).readers["comfy"] is None
    path = path.rename(tmp_path / "a.safetensors")
    assert "'unnorm'" in (examine(path).readers["comfy"] or "")


@pytest.mark.parametrize("tokens", [4, 16])
def test_the_xlabs_container_is_named(tokens: int, tmp_path: Path) -> None:
    weights = {
        "ip_adapter_proj_model.proj.weight": torch.zeros(tokens * 8, 8),
        "ip_adapter_proj_model.norm.weight": torch.zeros(8),
        "double_blocks.18.processor.ip_adapter_double_stream_k_proj.weight": torch.zeros(8, 8),
    }
    save_file(weights, tmp_path / "a.safetensors")
    report = examine(tmp_path / "a.safetensors")
    assert report.variant.startswith("FLUX, XLabs:") and report.layers == [18] and report.tokens == tokens


CARD = AdapterCard(
    variant="plus", variant_config={"num_tokens": 16}, family="sdxl", num_tokens=16, step=9, images_seen=9,
    pretrained_model_name_or_path="a/base", image_encoder_path="an/encoder", feature="penultimate", feature_dim=512,
    context_dim=2048, package_version="0",
)  # fmt: skip


def test_a_card_is_believed_before_shapes_are_guessed_from() -> None:
    faces = {f"image_proj.{name}": torch.empty(shape, device="meta") for name, shape in RESAMPLER.items()}
    plus = published("plus", 768, 512)
    small = {f"image_proj.{name}": tensor for name, tensor in plus.image_proj.items()}
    for tensors, metadata, is_foreign in ((faces, {}, True), (faces, CARD.to_metadata(), False), (small, {}, False)):
        raw = RawFile(Path("a.safetensors"), "safetensors", tensors, metadata, 0)
        assert (foreign_of(raw) is not None) == is_foreign


def test_a_card_that_the_shapes_contradict_is_told_and_nothing_is_started_from_it(
    base_folder: Callable, encoder_folder: Path, tmp_path: Path
) -> None:
    model = build(base_folder("sd1"), encoder_folder, "plus")
    card = card_of(model, base=str(base_folder("sd1")), step=3, images_seen=9, loaded_with={})
    metadata = card.to_metadata() | {"variant": "base", "feature": "last", "feature_dim": "47"}
    write_adapter(tmp_path / "a.safetensors", model.adapter.published(), metadata, UNET)
    report = examine(tmp_path / "a.safetensors")
    for told in (
        "variant 'base', the weights plus",
        "feature 'last', the weights pen",
        "feature_dim 47, the weights 48",
    ):
        assert any(f"the card says {told}" in remark for remark in report.remarks)
    assert report.variant == "plus" and "the card says" in (report.start_refusal or "")
    with pytest.raises(Problem, match="the card says"):
        read_adapter_into(model, tmp_path / "a.safetensors")


def test_what_inspect_says_of_starting_is_what_training_does(
    base_folder: Callable, encoder_folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "a.bin"
    wide = build(base_folder("sd1"), encoder_folder, "plus", num_tokens=32, resampler_heads=8)
    write_adapter(file, wide.adapter.published(), {}, UNET)
    flags = f"--pretrained_ip_adapter_path {file} --variant plus --num_tokens 32 --resampler_heads 8"
    assert examine(file).start_flags == flags
    read_adapter_into(wide, file)
    with pytest.raises(Problem, match="other sizes") as caught:
        read_adapter_into(build(base_folder("sd1"), encoder_folder, "plus"), file)
    assert caught.value.fault.remedy == "take --num_tokens 32 --resampler_heads 8"
    tables = wide.adapter.published()
    tables["image_proj"]["pos_emb.weight"] = torch.zeros(5, 64)
    write_adapter(file, tables, {}, UNET)
    assert "pos_emb.weight has the shape [5, 64], and none" in (examine(file).start_refusal or "")
    with pytest.raises(Problem, match="pos_emb"):
        read_adapter_into(wide, file)


@pytest.mark.parametrize(
    "file, flags",
    [
        (published("base", 768, 1024), []),
        (published("full", 1024, 1280), []),
        (published("plus", 2048, 1280), []),
        (published("plus", 768, 1280, resampler_dim=512), ["--resampler_dim 512"]),
    ],
)
def test_published_adapters_can_be_started_from_with_these_flags(file: AdapterFile, flags: list[str]) -> None:
    fitting_config(file)
    assert flags_to_fit(file) == flags


def test_what_is_no_adapter_is_a_problem(tmp_path: Path) -> None:
    torch.save({"image_proj": {"latents": torch.zeros(()), "proj_in.weight": torch.zeros(0)}}, tmp_path / "a.bin")
    for path in (tmp_path / "a.bin", tmp_path / "missing.bin", tmp_path):
        with pytest.raises(Problem):
            examine(path)
