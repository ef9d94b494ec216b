"""An exported file computes in diffusers what the live adapter computes here, or there is no file."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPVisionModelWithProjection

from ip_adapter_trainer import export as exporting
from ip_adapter_trainer.adapter_files import read_adapter, write_adapter
from ip_adapter_trainer.card import card_of
from ip_adapter_trainer.core.errors import Problem, StorageProblem
from ip_adapter_trainer.export import TOLERANCE, ExportConfig, Exported, export
from ip_adapter_trainer.layouts import make_layout
from ip_adapter_trainer.loading.adapter import load_model
from ip_adapter_trainer.model import Model
from ip_adapter_trainer.train import checkpoint
from tests import tiny
from tests.disks import limited
from tests.published import Trained, with_processors
from tests.test_model import build

VARIANTS = ("base", "plus", "full")
EVERY = [(base, variant, ".safetensors") for base in tiny.BASES for variant in VARIANTS]
EVERY += [("sd1", variant, ".bin") for variant in VARIANTS]
# diffusers preprocesses with torchvision where that is installed, which rounds pixels otherwise
SAME = 0.0 if importlib.util.find_spec("torchvision") is None else 0.05


def trained(base: Path, encoder: Path, variant: str) -> Model:
    """A model whose adapter differs from its first weights in every tensor."""
    torch.manual_seed(1)
    model = build(base, encoder, variant)
    with torch.no_grad():
        for parameter in model.adapter.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def save(model: Model, base: Path, output: Path, step: int = 50) -> Path:
    output.mkdir(exist_ok=True)
    card = card_of(model, base=str(base), step=step, images_seen=8 * step, loaded_with={})
    return checkpoint.write(output, checkpoint.take(step, model.adapter.state_dict(), card, {}))


def picture() -> Image.Image:
    """Not square, not the encoder's size."""
    pixels = np.random.default_rng(3).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((140, 100))


def drawn(pipeline: Any, **image: Any) -> Tensor:
    """Latents [1, 4, 8, 8] after three guided steps from fixed noise."""
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    settings = {"num_inference_steps": 3, "guidance_scale": 5.0, "output_type": "latent", "latents": noise}
    return pipeline("a red star", negative_prompt="blue", height=32, width=32, **settings, **image).images


def drawn_by_us(model: Model) -> Tensor:
    features, nulls = model.features({"image": model.encoder.preprocess(picture())[None]}), model.null(1)
    with torch.no_grad(), model.attached():
        model.show(model.project({need: torch.cat([nulls[need], features[need]]) for need in features}))
        return drawn(model.denoiser.pipeline)


def drawn_by_diffusers(base: Path, encoder: Path, file: Path) -> Tensor:
    kind = StableDiffusionXLPipeline if (base / "tokenizer_2").exists() else StableDiffusionPipeline
    eyes = CLIPVisionModelWithProjection.from_pretrained(encoder)
    pipeline = kind.from_pretrained(base, image_encoder=eyes)
    pipeline.load_ip_adapter(str(file.parent), subfolder="", weight_name=file.name)
    pipeline.set_ip_adapter_scale(1.0)
    return drawn(pipeline, ip_adapter_image=picture())


@pytest.mark.parametrize("case", EVERY, ids="-".join)
def test_a_file_draws_in_diffusers_what_the_live_adapter_draws(
    case: tuple[tiny.Base, str, str], base_folder: Callable, encoder_folder: Path, tmp_path: Path
) -> None:
    kind, variant, suffix = case
    base = base_folder(kind)
    model = trained(base, encoder_folder, variant)
    file = tmp_path / "out" / f"adapter{suffix}"
    exported = export(ExportConfig(source=str(save(model, base, tmp_path / "run")), output=str(file), dtype="fp32"))
    assert exported.difference <= TOLERANCE and exported.path == file and exported.variant == variant
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    ours, theirs = drawn_by_us(model), drawn_by_diffusers(base, encoder_folder, file)
    assert float((ours - theirs).abs().max()) <= SAME
    assert float((ours - drawn(model.denoiser.pipeline)).abs().max()) > 0.01, "the adapter must matter"
    read_strictly(model, file)


def test_an_encoder_that_only_we_can_load_is_told(base_folder: Callable, encoder_folder: Path, tmp_path: Path) -> None:
    """And one that cannot be loaded is vouched for by nobody, whatever the run was trained with."""
    encoder = Path(shutil.copytree(encoder_folder, tmp_path / "encoder"))
    base, weights = base_folder("sd1"), encoder / "model.safetensors"
    good = load_file(weights)
    save_file({f"module.{key}": value for key, value in good.items()}, weights)
    source = str(save(trained(base, encoder, "plus"), base, tmp_path / "run"))
    told = str(export(ExportConfig(source=source, output=str(tmp_path / "a.bin"))))
    assert "carry a wrapper's prefix" in told
    save_file({key: value for key, value in good.items() if "layers.0.mlp" not in key}, weights)
    with pytest.raises(Problem, match="the image encoder lacks 4 of"):
        export(ExportConfig(source=source, output=str(tmp_path / "b.bin")))
    assert not (tmp_path / "b.bin").exists()


def read_strictly(model: Model, file: Path) -> None:
    """As the original classes read: a list of all processors, and every key of the file in its place."""
    content = read_adapter(file)
    with_processors(model.denoiser.net).load_state_dict(content.ip_adapter, strict=True)
    model.adapter.image_proj_model.load_state_dict(content.image_proj, strict=True)


def test_the_published_conversion_of_our_checkpoint_loads_in_diffusers(
    base_folder: Callable, encoder_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = trained(base_folder("sd1"), encoder_folder, "plus")
    save(model, base_folder("sd1"), tmp_path, step=50000)
    monkeypatch.chdir(tmp_path)
    # As the README of tencent-ailab/IP-Adapter gives it, which users have in their notes.
    ckpt = "checkpoint-50000/pytorch_model.bin"
    sd = torch.load(ckpt, map_location="cpu")
    image_proj_sd = {}
    ip_sd = {}
    for k in sd:
        if k.startswith("unet"):
            pass
        elif k.startswith("image_proj_model"):
            image_proj_sd[k.replace("image_proj_model.", "")] = sd[k]
        elif k.startswith("adapter_modules"):
            ip_sd[k.replace("adapter_modules.", "")] = sd[k]
    torch.save({"image_proj": image_proj_sd, "ip_adapter": ip_sd}, "ip_adapter.bin")

    theirs = drawn_by_diffusers(base_folder("sd1"), encoder_folder, tmp_path / "ip_adapter.bin")
    assert float((drawn_by_us(model) - theirs).abs().max()) <= SAME
    read_strictly(model, tmp_path / "ip_adapter.bin")


def run(model: Model, base: Path, folder: Path, **settings: Any) -> Exported:
    source = settings.pop("source", None) or save(model, base, folder / "run")
    return export(ExportConfig(source=str(source), output=str(folder / "adapter.safetensors"), **settings))


@pytest.fixture
def base(base_folder: Callable) -> Path:
    return base_folder("sd1")


@pytest.fixture
def model(base: Path, encoder_folder: Path) -> Model:
    return trained(base, encoder_folder, "base")


def test_metadata_say_what_it_is_and_rebuild_it(model: Model, base: Path, encoder_folder: Path, tmp_path: Path) -> None:
    file = run(model, base, tmp_path).path
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    expected = {
        "variant": "base", "family": "sd", "num_tokens": "4", "feature": "image_embeds", "feature_dim": "40",
        "context_dim": "64", "step": "50", "images_seen": "400", "format_version": "1",
        "pretrained_model_name_or_path": str(base), "image_encoder_path": str(encoder_folder),
    }  # fmt: skip
    assert metadata.items() >= expected.items()
    assert json.loads(metadata["variant_config"]) == {"num_tokens": 4} and len(metadata["weights_sha256"]) == 64
    again = load_model(file)
    for name, tensor in model.adapter.state_dict().items():
        assert torch.equal(again.adapter.state_dict()[name], tensor.half().float())


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_precision_is_compared_with_the_same_rounded_weights(
    dtype: Any, model: Model, base: Path, tmp_path: Path
) -> None:
    exported = run(model, base, tmp_path, dtype=dtype)
    kinds = {tensor.dtype for table in read_adapter(exported.path).tables.values() for tensor in table.values()}
    assert kinds == {exporting.DTYPES[dtype]} and exported.difference <= TOLERANCE


def test_a_checkpoint_that_the_published_script_spoiled_becomes_a_file(
    model: Model, base: Path, encoder_folder: Path, tmp_path: Path
) -> None:
    module = Trained(build(base, encoder_folder, "base").denoiser.net, model.adapter.image_proj_model)
    expected = module.save(tmp_path / "checkpoint-700" / "model.safetensors")
    flags = {"pretrained_model_name_or_path": str(base), "image_encoder_path": str(encoder_folder)}
    exported = run(model, base, tmp_path, source=tmp_path / "checkpoint-700", dtype="fp32", **flags)
    file = read_adapter(exported.path)
    assert file.step == 700 and file.card is not None and file.card.images_seen is None
    for table, tensors in expected.items():
        assert all(torch.equal(file.tables[table][name], tensor) for name, tensor in tensors.items())


def test_a_file_becomes_the_other_container_and_back(
    model: Model, base: Path, encoder_folder: Path, tmp_path: Path
) -> None:
    first = run(model, base, tmp_path).path
    flags = {"pretrained_model_name_or_path": str(base), "image_encoder_path": str(encoder_folder)}
    for source, output in ((first, "b.bin"), (tmp_path / "b.bin", "c.safetensors")):
        export(ExportConfig(source=str(source), output=str(tmp_path / output), **flags))
    assert (
        read_adapter(tmp_path / "c.safetensors").metadata["weights_sha256"]
        == read_adapter(first).metadata["weights_sha256"]
    )


def test_readers_that_cannot_take_it_are_named(model: Model, base: Path, tmp_path: Path) -> None:
    exported = run(model, base, tmp_path)
    assert exported.refusals.keys() == {"comfy"}
    assert "notice: ComfyUI_IPAdapter_plus knows SD1.x and SD2.x with 16 layers, the file has 4" in str(exported)


def assert_nothing_new(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} <= {"run", "source.bin"}


def spoil(tables: Any, name: str) -> Any:
    table, key = name.split("/")
    changed = {t: dict(tensors) for t, tensors in tables.items()}
    changed[table][key] = changed[table][key] * 1.5
    return changed


@pytest.mark.parametrize("name", ["ip_adapter/3.to_v_ip.weight", "image_proj/norm.bias"])
def test_a_file_with_one_weight_changed_is_refused(
    name: str, model: Model, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        exporting, "write_adapter", lambda path, tables, *told: write_adapter(path, spoil(tables, name), *told)
    )
    with pytest.raises(Problem, match="was not written as it is"):
        run(model, base, tmp_path)
    assert_nothing_new(tmp_path)
    monkeypatch.setattr(exporting, "_reread", lambda stage, tables: read_adapter(stage))
    with pytest.raises(Problem, match="diffusers computes something else"):
        run(model, base, tmp_path, source=tmp_path / "run")
    assert_nothing_new(tmp_path)


def test_a_file_that_diffusers_does_not_load_is_refused(
    model: Model, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_a_layer(path: Path, tables: Any, *told: Any) -> None:
        pairs = {name: tensor for name, tensor in tables["ip_adapter"].items() if not name.startswith("7.")}
        write_adapter(path, {**tables, "ip_adapter": pairs}, *told)

    monkeypatch.setattr(exporting, "write_adapter", without_a_layer)
    monkeypatch.setattr(exporting, "_reread", lambda stage, tables: read_adapter(stage))
    with pytest.raises(Problem, match="diffusers does not load what was written"):
        run(model, base, tmp_path)
    assert_nothing_new(tmp_path)


def test_an_existing_file_stays_unless_told_and_even_then_until_the_new_one_is_verified(
    model: Model, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(model, base, tmp_path).path.read_bytes()
    with pytest.raises(Problem, match="the output exists") as caught:
        run(model, base, tmp_path)
    assert "--overwrite" in caught.value.fault.remedy
    with monkeypatch.context() as patched:
        patched.setattr(exporting, "verify", lambda model, file: (_ for _ in ()).throw(Problem("no")))
        with pytest.raises(Problem, match="no"):
            run(model, base, tmp_path, overwrite=True)
    assert (tmp_path / "adapter.safetensors").read_bytes() == first
    run(model, base, tmp_path, overwrite=True, dtype="fp32")
    assert len((tmp_path / "adapter.safetensors").read_bytes()) > len(first)
    assert {path.name for path in tmp_path.iterdir()} == {"run", "adapter.safetensors"}


@pytest.mark.parametrize(
    "value, dtype, what", [(1e6, "fp16", "does not fit into fp16"), (float("nan"), "fp32", "is not finite")]
)
def test_weights_that_are_not_finite_are_not_written(
    value: float, dtype: Any, what: str, model: Model, base: Path, tmp_path: Path
) -> None:
    with torch.no_grad():
        model.adapter.image_proj_model.proj.weight[0, 0] = value  # type: ignore[union-attr, index]
    with pytest.raises(Problem, match=f"image_proj.proj.weight {what}"):
        run(model, base, tmp_path, dtype=dtype)
    assert_nothing_new(tmp_path)


def test_bad_outputs_are_refused_before_anything_is_loaded(model: Model, tmp_path: Path) -> None:
    for output, what in ((tmp_path / "a.ckpt", r"not \.ckpt"), (tmp_path / "adapter", "without a suffix")):
        with pytest.raises(Problem, match=what):
            export(ExportConfig(source="nowhere", output=str(output)))
    (tmp_path / "folder.bin").mkdir()
    with pytest.raises(Problem, match="the output exists"):
        export(ExportConfig(source="nowhere", output=str(tmp_path / "folder.bin")))


def test_an_output_that_cannot_be_written_is_told(model: Model, base: Path, tmp_path: Path) -> None:
    (tmp_path / "source.bin").touch()
    source = str(save(model, base, tmp_path / "run"))
    with pytest.raises(Problem, match="a file is where a folder is needed"):
        export(ExportConfig(source=source, output=str(tmp_path / "source.bin" / "a.bin")))
    with limited(1000), pytest.raises(StorageProblem, match="was not written"):
        export(ExportConfig(source=source, output=str(tmp_path / "a.bin")))
    assert_nothing_new(tmp_path)


def test_an_adapter_that_diffusers_would_compute_otherwise_is_refused(
    base: Path, encoder_folder: Path, tmp_path: Path
) -> None:
    tables = trained(base, encoder_folder, "plus").adapter.published()
    deeper = {name.replace("layers.3.", "layers.4."): tensor for name, tensor in tables["image_proj"].items()}
    write_adapter(
        tmp_path / "source.bin", {**tables, "image_proj": {**tables["image_proj"], **deeper}}, {}, make_layout("unet")
    )
    with pytest.raises(Problem, match="diffusers computes a resampler of depth 4, the file has 5"):
        export(ExportConfig(source=str(tmp_path / "source.bin"), output=str(tmp_path / "adapter.bin")))
    assert_nothing_new(tmp_path)


def test_the_pipeline_is_given_back_as_it_was(model: Model, base: Path, tmp_path: Path) -> None:
    before = drawn(model.denoiser.pipeline)
    write_adapter(tmp_path / "adapter.safetensors", model.adapter.published(), {}, model.layout)
    assert exporting.verify(model, tmp_path / "adapter.safetensors") <= TOLERANCE
    assert model.denoiser.pipeline.image_encoder is None and not model.is_attached
    assert torch.equal(drawn(model.denoiser.pipeline), before)
