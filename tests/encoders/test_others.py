"""SigLIP, SigLIP 2 and DINOv2 in CLIP's place, from images and from prepared sets, to files that diffusers computes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image

from ip_adapter_trainer.core.errors import Problem
from ip_adapter_trainer.evaluate.config import GenerateConfig
from ip_adapter_trainer.evaluate.generate import generate
from ip_adapter_trainer.export import ExportConfig, export
from ip_adapter_trainer.inspection import examine
from ip_adapter_trainer.loading.encoder import load_encoder
from ip_adapter_trainer.storage.checkpoints import all_checkpoints
from tests import tiny

CHAINS = [
    ("siglip", "base", "sd1"), ("siglip", "plus", "sdxl"), ("siglip2", "full", "sd1"), ("dinov2", "plus", "sd1"),
    ("dinov2", "base", "sdxl"), ("dinov2_with_registers", "full", "sdxl"),
]  # fmt: skip
NAMES = ("image_embeds", "penultimate")


@pytest.fixture(scope="session")
def other_encoder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[tiny.Encoder], Path]:
    made: dict[str, Path] = {}

    def get(kind: tiny.Encoder) -> Path:
        return made.setdefault(kind, tiny.make_other_encoder(tmp_path_factory.mktemp(kind), kind))

    return get


def weights(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(all_checkpoints(run)[-1] / "pytorch_model.bin", weights_only=True)


@pytest.mark.parametrize("kind", tiny.ENCODERS)
def test_features_are_those_of_transformers_own_model(kind: tiny.Encoder, other_encoder: Callable) -> None:
    folder = other_encoder(kind)
    encoder = load_encoder(str(folder), features=NAMES, dtype=torch.float32)
    image = Image.effect_noise((50, 40), 80).convert("RGB")
    processor = transformers.AutoImageProcessor.from_pretrained(str(folder), backend="pil")
    pixels = processor(images=image, return_tensors="pt")["pixel_values"]
    assert torch.equal(encoder.preprocess(image)[None], pixels)
    model = getattr(transformers, encoder.model_class).from_pretrained(folder).eval()
    with torch.no_grad():
        expected = model(pixels, output_hidden_states=True)
    found = encoder.encode(pixels, NAMES)
    torch.testing.assert_close(found["image_embeds"], expected.pooler_output)
    torch.testing.assert_close(found["penultimate"], expected.hidden_states[-2])
    assert {name: tuple(feature.shape[1:]) for name, feature in found.items()} == encoder.features


@pytest.mark.parametrize(("kind", "variant", "base"), CHAINS)
def test_a_whole_chain(
    kind: tiny.Encoder, variant: str, base: str, other_encoder: Callable, train_run: Callable, tmp_path: Path
) -> None:
    """Train, resume, train from a prepared set to the same bytes, export, inspect and draw."""
    more = {"base": base, "variant": variant, "image_encoder_path": other_encoder(kind), "image_drop_rate": 0.3}
    whole = train_run(tmp_path / "whole", **more)
    half = train_run(tmp_path / "half", max_train_steps=2, **more)
    train_run(half, resume_from_checkpoint="latest", **more)
    prepared = train_run(tmp_path / "prepared", prepare="auto", num_train_epochs=100, **more)
    for other in (half, prepared):
        assert all(torch.equal(tensor, weights(whole)[name]) for name, tensor in weights(other).items())
    file = tmp_path / "adapter.safetensors"
    exported = export(ExportConfig(source=str(whole), output=str(file)))
    assert exported.difference <= 1e-5 and exported.reader == "diffusers" and "comfy" in exported.refusals
    report = examine(file)
    assert report.image_encoder.startswith(kind.replace("siglip2", "siglip"))
    assert any("ip_adapter_image_embeds" in remark for remark in report.remarks)
    card = json.loads((all_checkpoints(whole)[-1] / "adapter.json").read_text())
    assert card["no_image"] and card["preprocessing"]["image_processor_type"]
    image = tmp_path / "prompt.png"
    Image.effect_noise((40, 40), 90).convert("RGB").save(image)
    config = GenerateConfig(
        adapter=str(file), image=(str(image),), num_inference_steps=2, height=32, width=32, output=str(tmp_path / "d")
    )
    assert len(generate(config)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("base", ["sd1", "sdxl"])
@pytest.mark.parametrize("variant", ["base", "plus", "full"])
@pytest.mark.parametrize("kind", tiny.ENCODERS)
def test_every_variant_trains_with_every_encoder(
    kind: tiny.Encoder, variant: str, base: str, other_encoder: Callable, train_run: Callable, tmp_path: Path
) -> None:
    run = train_run(tmp_path / "run", base=base, variant=variant, image_encoder_path=other_encoder(kind))
    assert export(ExportConfig(source=str(run), output=str(tmp_path / "a.safetensors"))).difference <= 1e-5


def test_the_pages_way_to_diffusers_draws(
    other_encoder: Callable, base_folder: Callable, train_run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train_run(tmp_path / "run", variant="plus", image_encoder_path=other_encoder("siglip"))
    export(ExportConfig(source=str(run), output=str(tmp_path / "my-adapter.safetensors")))
    Image.effect_noise((40, 40), 90).convert("RGB").save(tmp_path / "photo.jpg")
    text = (Path(__file__).parents[2] / "docs" / "encoders.md").read_text()
    block = "\n".join(line[4:] for line in text.splitlines() if line.startswith("    "))
    for name, folder in (
        ("google/siglip-so400m-patch14-384", other_encoder("siglip")),
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", base_folder("sd1")),
    ):
        assert name in block
        block = block.replace(name, str(folder))
    monkeypatch.chdir(tmp_path)
    exec(compile(block.replace("num_inference_steps=30", "num_inference_steps=1"), "encoders.md", "exec"), {})
    assert (tmp_path / "on-a-beach.png").exists()


def test_an_encoder_without_its_preprocessing_is_refused(other_encoder: Callable, tmp_path: Path) -> None:
    folder = tiny.make_other_encoder(tmp_path / "encoder", "siglip")
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(Problem, match="no preprocessor_config"):
        load_encoder(str(folder), features=NAMES, dtype=torch.float32)


def test_an_encoder_of_free_resolution_is_named(tmp_path: Path) -> None:
    folder = tiny.make_other_encoder(tmp_path / "encoder", "siglip")
    settings = json.loads((folder / "config.json").read_text()) | {"model_type": "siglip2_vision_model"}
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(Problem, match="siglip2_vision_model"):
        load_encoder(str(folder), features=NAMES, dtype=torch.float32)
