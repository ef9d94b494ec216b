"""Adapter files are read in every layout that is about, and nothing in them is believed, let alone executed."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ip_adapter_trainer.adapter_files import AdapterCard, AdapterFile, read_adapter, weights_sha256, write_adapter
from ip_adapter_trainer.card import card_of
from ip_adapter_trainer.core.errors import Problem, StorageProblem
from ip_adapter_trainer.layouts import make_layout
from ip_adapter_trainer.loading.adapter import load_model, read_adapter_into
from ip_adapter_trainer.model import Model
from ip_adapter_trainer.storage.checkpoints import MANIFEST
from ip_adapter_trainer.train import checkpoint
from tests.published import Trained
from tests.test_model import build

UNET = make_layout("unet")
Tables = Mapping[str, Mapping[str, Tensor]]


def tables(layers: int = 2, width: int = 8) -> dict[str, dict[str, Tensor]]:
    """A small, valid base adapter."""
    torch.manual_seed(0)
    projector = {"proj.weight": (32, 6), "proj.bias": (32,), "norm.weight": (8,), "norm.bias": (8,)}
    pairs = {f"{2 * i + 1}.to_{x}_ip.weight": (width, 8) for i in range(layers) for x in "kv"}
    return {
        "image_proj": {name: torch.randn(shape) for name, shape in projector.items()},
        "ip_adapter": {name: torch.randn(shape) for name, shape in pairs.items()},
    }


def flat(content: Tables, projector: str = "image_proj.", pairs: str = "ip_adapter.") -> dict[str, Tensor]:
    both = zip((projector, pairs), (content["image_proj"], content["ip_adapter"]), strict=True)
    return {prefix + name: tensor for prefix, table in both for name, tensor in table.items()}


def assert_same(file: AdapterFile, content: Tables) -> None:
    for table, tensors in content.items():
        assert file.tables[table].keys() == tensors.keys()
        assert all(torch.equal(file.tables[table][name], tensor) for name, tensor in tensors.items())


def write_layout(layout: str, folder: Path) -> Path:
    content, file = tables(), folder / ("a.bin" if layout.endswith("bin") else "a.safetensors")
    if layout == "published.bin":
        torch.save(content, file)
    elif layout == "legacy.bin":
        torch.save(content, file, _use_new_zipfile_serialization=False)
    elif layout == "comfy.bin":
        torch.save({"image_proj": content["image_proj"], "adapter_modules": content["ip_adapter"]}, file)
    elif layout == "checkpoint.bin":
        torch.save(flat(content, "image_proj_model.", "adapter_modules."), file)
    elif layout == "wrapped.bin":
        state = flat(content, "module.image_proj_model.", "module.adapter_modules.")
        torch.save({"module": state, "global_steps": 7, "buffers": []}, file)
    elif layout == "comfy":
        save_file(flat(content, pairs="adapter_modules."), file)
    else:
        save_file(flat(content), file)
    return file


LAYOUTS = ["published", "published.bin", "legacy.bin", "comfy", "comfy.bin", "checkpoint.bin", "wrapped.bin"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_published_tables(layout: str, tmp_path: Path) -> None:
    file = read_adapter(write_layout(layout, tmp_path))
    assert_same(file, tables())
    assert file.numbers == [1, 3] and file.facts == {"num_tokens": 4, "feature_dim": 6, "context_dim": 8}
    origin = layout.removesuffix(".bin")
    assert file.origin == {"legacy": "published", "wrapped": "checkpoint"}.get(origin, origin)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_what_is_written_is_what_is_read(suffix: str, tmp_path: Path) -> None:
    content = tables()
    wide = torch.randn(8, 16)
    content["ip_adapter"]["1.to_k_ip.weight"] = wide[:, :8]  # a view: neither contiguous nor alone in its storage
    file = tmp_path / f"a{suffix}"
    write_adapter(file, content, {"note": "x"}, UNET)
    assert_same(read_adapter(file), content)


def test_a_bin_depends_on_its_tensors_alone(tmp_path: Path) -> None:
    content = tables()
    for name in ("a.bin", "b.bin"):
        write_adapter(tmp_path / name, content, {}, UNET)
    for name in ("1.to_k_ip.weight", "1.to_v_ip.weight"):
        wide = torch.zeros(8, 2000) if "to_k" in name else torch.zeros(2000, 8)
        part = wide[:8, :8]  # the second is contiguous, in a storage far larger than itself
        content["ip_adapter"][name] = part.copy_(content["ip_adapter"][name])
    write_adapter(tmp_path / "c.bin", content, {}, UNET)
    assert len({(tmp_path / name).read_bytes() for name in ("a.bin", "b.bin", "c.bin")}) == 1


def test_a_bin_is_two_plain_tables_in_order_and_a_safetensors_is_flat_with_metadata(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a.bin", tables(), {"note": "x"}, UNET)
    loaded = torch.load(tmp_path / "a.bin", weights_only=True)
    assert type(loaded) is dict and list(loaded) == ["image_proj", "ip_adapter"]
    assert all(type(table) is dict and type(t) is Tensor for table in loaded.values() for t in table.values())
    write_adapter(tmp_path / "a.safetensors", tables(), {"note": "x"}, UNET)
    with safe_open(tmp_path / "a.safetensors", "pt") as opened:
        assert set(opened.keys()) == set(flat(tables()))
        assert opened.metadata() == {"format": "pt", "note": "x", "weights_sha256": weights_sha256(tables())}


def test_other_suffixes_and_unwritable_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Problem, match=r"not \.pt"):
        write_adapter(tmp_path / "a.pt", tables(), {}, UNET)
    for suffix in (".safetensors", ".bin"):
        with pytest.raises(StorageProblem, match="was not written"):
            write_adapter(tmp_path / "missing" / f"a{suffix}", tables(), {}, UNET)


class Hostile:
    """Touches a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("how", ["zip", "legacy", "pickle", "nested", "checkpoint"])
def test_a_hostile_pickle_is_refused_and_not_executed(how: str, tmp_path: Path) -> None:
    target, file = tmp_path / "touched", tmp_path / "a.bin"
    hostile: Any = Hostile(target)
    if how == "pickle":
        file.write_bytes(pickle.dumps(hostile, protocol=2))
    elif how == "legacy":
        torch.save(hostile, file, _use_new_zipfile_serialization=False)
    elif how == "checkpoint":
        file = tmp_path / "checkpoint-1" / "pytorch_model.bin"
        file.parent.mkdir()
        torch.save(flat(tables(), "image_proj_model.", "adapter_modules.") | {"extra": hostile}, file)
        file = file.parent
    else:
        torch.save(hostile if how == "zip" else tables() | {"config": {"x": hostile}}, file)
    with pytest.raises(Problem):
        read_adapter(file)
    assert not target.exists()


@pytest.mark.parametrize("layout", ["published", "published.bin", "legacy.bin"])
def test_a_file_cut_anywhere_is_a_problem_and_nothing_else(layout: str, tmp_path: Path) -> None:
    file = write_layout(layout, tmp_path)
    whole = file.read_bytes()
    for end in {0, 1, 7, 8, 9, *range(16, len(whole), len(whole) // 23), len(whole) - 1}:
        file.write_bytes(whole[:end])
        with pytest.raises(Problem, match=r"read|opened|empty"):
            read_adapter(file)


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
@pytest.mark.parametrize(
    ("begin", "told"),
    [
        (b"\x89PNG\r\n\x1a\n", "a PNG picture"),
        (b"\xff\xd8\xff\xe0\0\x10JFIF", "a JPEG picture"),
        (b"RIFF\n\0\0\0WEBPVP8 ", "a WebP picture"),
        (b"\n<!DOCTYPE html>\n<html>", "an HTML page, probably of a download"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS in place of the weights"),
    ],
)
def test_what_people_have_in_place_of_weights_is_named(tmp_path: Path, suffix: str, begin: bytes, told: str) -> None:
    (tmp_path / f"a{suffix}").write_bytes(begin + bytes(500))
    with pytest.raises(Problem, match=f"the file is {told}"):
        read_adapter(tmp_path / f"a{suffix}")


def test_noise_is_a_problem_and_nothing_else(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    for suffix in (".bin", ".safetensors"):
        for begin in (b"", b"PK\x03\x04", b"\x80\x02", b"\x10\0\0\0\0\0\0\0{", b"version https://git-lfs\n"):
            file = tmp_path / f"a{suffix}"
            noise = torch.randint(256, (500,), generator=generator, dtype=torch.uint8).numpy().tobytes()
            file.write_bytes(begin + noise)
            with pytest.raises(Problem):
                read_adapter(file)


def test_a_compressed_archive_is_refused(tmp_path: Path) -> None:
    torch.save(tables(), tmp_path / "plain.bin")
    with zipfile.ZipFile(tmp_path / "plain.bin") as plain, zipfile.ZipFile(tmp_path / "a.bin", "w") as packed:
        for entry in plain.infolist():
            packed.writestr(entry.filename, plain.read(entry), zipfile.ZIP_DEFLATED)
    with pytest.raises(Problem, match="compressed"):
        read_adapter(tmp_path / "a.bin")


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(1).expand(10**6, 10**6),
        torch.zeros(8, 8, device="meta"),
        torch.zeros(8, 8).to_sparse(),
    ],
    ids=["more elements than bytes", "no storage", "sparse"],
)
def test_tensors_that_claim_more_than_they_hold_are_refused(tensor: Tensor, tmp_path: Path) -> None:
    content = tables()
    content["ip_adapter"]["1.to_k_ip.weight"] = tensor
    torch.save(content, tmp_path / "a.bin")
    with pytest.raises(Problem, match=r"plain tensor|something else than tensors"):
        read_adapter(tmp_path / "a.bin")


def put(name: str, tensor: Tensor) -> Callable[[dict], None]:
    return lambda pairs: pairs.update({name: tensor})


@pytest.mark.parametrize(
    "change, what",
    [
        (lambda pairs: pairs.pop("3.to_v_ip.weight"), r"3\.to_v_ip\.weight is missing"),
        (put("2.to_k_ip.weight", torch.zeros(8, 8)), "odd numbers"),
        (put("x.to_k_ip.weight", torch.zeros(8, 8)), "no part of an adapter"),
        (put("1.to_k_ip.bias", torch.zeros(8)), "no part of an adapter"),
        (put("1.to_q.weight", torch.zeros(8, 8)), "no part of an adapter"),
        (put("1.to_k_ip.weight", torch.zeros(8)), r"shapes \[8\] and \[8, 8\]"),
        (put("1.to_k_ip.weight", torch.zeros(9, 8)), r"shapes \[9, 8\] and \[8, 8\]"),
        (put("1.to_k_ip.weight", torch.zeros(8, 8, dtype=torch.int8)), "int8, not floating point"),
    ],
)
def test_pairs_that_no_reader_could_place(change: Callable[[dict], object], what: str, tmp_path: Path) -> None:
    content = tables()
    change(content["ip_adapter"])
    torch.save(content, tmp_path / "a.bin")
    with pytest.raises(Problem, match=what) as caught:
        read_adapter(tmp_path / "a.bin")
    assert caught.value.fault.where and caught.value.fault.remedy


def test_an_unknown_layout_is_refused_with_what_was_found(tmp_path: Path) -> None:
    torch.save({"unet": {"conv.weight": torch.zeros(1)}, "vae": torch.zeros(1), "step": 3}, tmp_path / "a.bin")
    with pytest.raises(Problem, match=r"it holds unet \(1\), vae \(1\)"):
        read_adapter(tmp_path / "a.bin")
    torch.save([torch.zeros(1)], tmp_path / "b.bin")
    with pytest.raises(Problem, match="it holds a list"):
        read_adapter(tmp_path / "b.bin")
    with pytest.raises(Problem, match="no such file"):
        read_adapter(tmp_path / "c.bin")
    with pytest.raises(Problem, match="no checkpoint"):
        read_adapter(tmp_path)


def test_a_projector_of_no_variant_and_one_of_wrong_shapes_are_refused(tmp_path: Path) -> None:
    content = tables()
    write_adapter(tmp_path / "a.bin", {**content, "image_proj": {"mlp.weight": torch.zeros(2, 2)}}, {}, UNET)
    with pytest.raises(Problem, match="none of the variants base, full, plus"):
        _ = read_adapter(tmp_path / "a.bin").variant
    content["image_proj"]["proj.weight"] = torch.zeros(4)
    write_adapter(tmp_path / "b.bin", content, {}, UNET)
    with pytest.raises(Problem, match="names of the base variant and not its shapes"):
        _ = read_adapter(tmp_path / "b.bin").facts


def test_a_flipped_bit_is_noticed_in_our_files(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    write_adapter(file, tables(), {}, UNET)
    content = bytearray(file.read_bytes())
    content[-20] ^= 1
    file.write_bytes(content)
    load_file(file)  # the library has no objection
    with pytest.raises(Problem, match="not the ones that were written"):
        read_adapter(file)


@pytest.fixture
def model(base_folder: Callable, encoder_folder: Path) -> Model:
    torch.manual_seed(0)
    return build(base_folder("sd1"), encoder_folder, "base")


def save_checkpoint(model: Model, base: Path, output: Path, step: int) -> Path:
    card = card_of(model, base=str(base), step=step, images_seen=2 * step, loaded_with={})
    output.mkdir(exist_ok=True)
    return checkpoint.write(output, checkpoint.take(step, model.adapter.state_dict(), card, {}))


def test_a_run_is_its_newest_whole_checkpoint(
    model: Model, base_folder: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [save_checkpoint(model, base_folder("sd1"), tmp_path / "run", step) for step in (9, 10)]
    file = read_adapter(tmp_path / "run")
    assert file.path == folders[1] / "pytorch_model.bin" and file.origin == "checkpoint"
    assert file.card is not None and file.step == 10 and file.card.images_seen == 20
    damaged = bytearray(file.path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    file.path.write_bytes(damaged)
    assert read_adapter(tmp_path / "run").step == 9
    assert "checkpoint-10 is incomplete or damaged" in capsys.readouterr().err
    for path in (folders[1], file.path):
        with pytest.raises(Problem, match="checkpoint is damaged"):
            read_adapter(path)


def test_a_card_that_was_changed_is_not_believed(model: Model, base_folder: Callable, tmp_path: Path) -> None:
    folder = save_checkpoint(model, base_folder("sd1"), tmp_path / "run", 10)
    card = folder / "adapter.json"
    card.write_text(card.read_text().replace('"step": 10', '"step": 19'))
    with pytest.raises(Problem, match="checkpoint is damaged"):
        read_adapter(folder)
    card.unlink()
    with pytest.raises(Problem, match="checkpoint is damaged"):
        read_adapter(folder / "pytorch_model.bin")


def test_a_checkpoint_names_its_models_and_rebuilds_itself(model: Model, base_folder: Callable, tmp_path: Path) -> None:
    folder = save_checkpoint(model, base_folder("sd1"), tmp_path / "run", 3)
    again = load_model(folder)
    assert again.variant is model.variant and again.architecture.config == model.architecture.config
    assert all(torch.equal(v, again.adapter.state_dict()[k]) for k, v in model.adapter.state_dict().items())


def test_loading_draws_from_no_one(base_folder: Callable, encoder_folder: Path, model: Model, tmp_path: Path) -> None:
    write_adapter(tmp_path / "a.bin", model.adapter.published(), {}, UNET)
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    load_model(tmp_path / "a.bin", str(base_folder("sd1")), str(encoder_folder))
    assert torch.equal(torch.randn(3), expected)


def test_files_that_do_not_name_their_models_ask_for_flags(
    model: Model, base_folder: Callable, encoder_folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "a.bin"
    write_adapter(file, model.adapter.published(), {}, UNET)
    with pytest.raises(Problem, match="does not name its base model") as caught:
        load_model(file, None, str(encoder_folder))
    assert "--pretrained_model_name_or_path" in caught.value.fault.remedy
    with pytest.raises(Problem, match="does not name its image encoder"):
        load_model(file, str(base_folder("sd1")))
    with pytest.raises(Problem, match=r"tokens of width 64, the base model reads 128"):
        load_model(file, str(base_folder("sd2v")), str(encoder_folder))


def test_a_moved_base_model_is_told_with_who_named_it(model: Model, tmp_path: Path) -> None:
    folder = save_checkpoint(model, tmp_path / "moved", tmp_path / "run", 3)
    with pytest.raises(Problem, match=r"named by .*pytorch_model\.bin") as caught:
        load_model(folder)
    assert "--pretrained_model_name_or_path" in caught.value.fault.remedy


def test_starting_from_a_file_of_another_variant_is_refused(
    model: Model, base_folder: Callable, encoder_folder: Path, tmp_path: Path
) -> None:
    write_adapter(tmp_path / "a.bin", model.adapter.published(), {}, UNET)
    plus = build(base_folder("sd1"), encoder_folder, "plus")
    with pytest.raises(Problem, match="a base adapter, the model has a plus one"):
        read_adapter_into(plus, tmp_path / "a.bin")


def deep_unet() -> UNet2DConditionModel:
    """More than ten blocks in a row, so that names in alphabetical order are not in module order."""
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8, cross_attention_dim=64,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), transformer_layers_per_block=(1, 11),
        attention_head_dim=8, use_linear_projection=True,
    )  # fmt: skip


@pytest.mark.parametrize("prefix", ["", "module."])
def test_pairs_that_the_published_script_dropped_are_rescued(prefix: str, model: Model, tmp_path: Path) -> None:
    trained = Trained(deep_unet(), model.adapter.image_proj_model)
    expected = trained.save(tmp_path / "checkpoint-500" / "model.safetensors", prefix=prefix)
    saved = load_file(tmp_path / "checkpoint-500" / "model.safetensors")
    assert not any("adapter_modules" in name for name in saved), "the fault of the published script"
    assert any(".transformer_blocks.10." in name for name in saved)
    file = read_adapter(tmp_path)
    assert file.origin == "rescued" and file.step == 500
    assert_same(file, expected)


def test_a_published_checkpoint_that_lost_nothing_is_read_as_it_is(model: Model, tmp_path: Path) -> None:
    trained = Trained(deep_unet(), model.adapter.image_proj_model)
    expected = trained.save(tmp_path / "pytorch_model.bin")
    file = read_adapter(tmp_path)
    assert file.origin == "checkpoint"
    assert_same(file, expected)


def test_rescued_layers_must_be_the_base_models_own(
    model: Model, base_folder: Callable, encoder_folder: Path, tmp_path: Path
) -> None:
    unet = build(base_folder("sd1"), encoder_folder, "base").denoiser.net
    Trained(unet, model.adapter.image_proj_model).save(tmp_path / "model.safetensors")
    read_adapter_into(model, tmp_path)
    content = load_file(tmp_path / "model.safetensors")
    renamed = {
        name.replace("unet.up_blocks.1.attentions.1", "unet.up_blocks.0.attentions.1"): t for name, t in content.items()
    }
    save_file(renamed, tmp_path / "model.safetensors")
    with pytest.raises(Problem, match=r"layer up_blocks\.0\.attentions\.1\S+ would be number 3, which is up_blocks\.1"):
        read_adapter_into(model, tmp_path)
    odd = {name.replace("mid_block.attentions", "mid_block.other"): t for name, t in content.items()}
    save_file(odd, tmp_path / "model.safetensors")
    with pytest.raises(Problem, match="cannot be told from its name"):
        read_adapter(tmp_path)


@pytest.mark.parametrize(
    ("more", "version"),
    [
        ({}, 1),
        ({"loaded_with": {"clip_skip": 2, "revision": "a"}}, 2),
        ({"layout": "unet_lora", "layout_config": {"lora_rank": 8}}, 3),
        ({"image_encoder": "siglip", "preprocessing": {"size": [8, 8]}, "loaded_with": {"revision": "a"}}, 3),
        ({"no_image": {"penultimate": "black_image"}}, 3),
    ],
)
def test_a_card_comes_back_from_json_and_from_metadata(model: Model, more: dict[str, Any], version: int) -> None:
    plain = card_of(model, base="b", step=3, images_seen=6, loaded_with={})
    card = plain.model_copy(update=more)
    assert AdapterCard.from_json(card.to_json(), "x") == card
    assert json.loads(card.to_json())["format_version"] == version, "older versions read those"
    assert AdapterCard.from_metadata(card.to_metadata(), "x") == card
    assert all(isinstance(value, str) for value in card.to_metadata().values())
    unknown = card.model_copy(update={"step": None, "images_seen": None})
    assert AdapterCard.from_metadata(unknown.to_metadata() | {"added": "by others"}, "x") == unknown
    assert AdapterCard.from_metadata({"format": "pt", "variant": "base"}, "x") is None


def test_a_card_that_cannot_be_understood_is_refused(model: Model) -> None:
    content = json.loads(card_of(model, base="b", step=3, images_seen=6, loaded_with={}).to_json())
    for change, what in (
        ({"stepp": 1}, "unknown key 'stepp'"),
        ({"format_version": 4}, "has format 4, this package knows 3"),
        ({"step": "many"}, "step: "),
        ({"feature_dim": "wide"}, "feature_dim: "),
    ):
        with pytest.raises(Problem, match=what) as caught:
            AdapterCard.from_json(json.dumps(content | change), "adapter.json")
        assert caught.value.fault.where == "adapter.json" and caught.value.fault.remedy
    for text in ("{", "[]", "3"):
        with pytest.raises(Problem, match="cannot be read"):
            AdapterCard.from_json(text, "adapter.json")
    metadata = {"package": "ip_adapter_trainer", "format_version": "4"}
    with pytest.raises(Problem, match="has format 4"):
        AdapterCard.from_metadata(metadata, "a")


def test_a_manifest_without_the_weights_is_damage(model: Model, base_folder: Callable, tmp_path: Path) -> None:
    folder = save_checkpoint(model, base_folder("sd1"), tmp_path / "run", 3)
    (folder / MANIFEST).write_text("{}")
    with pytest.raises(Problem, match="damaged"):
        read_adapter(folder)
