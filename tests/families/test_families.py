"""What families feed the denoiser is what their pipelines feed it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ip_adapter_trainer.core.errors import Problem
from ip_adapter_trainer.core.values import Geometry
from ip_adapter_trainer.families import Family
from ip_adapter_trainer.loading.base import family_of, load_base
from tests import tiny

SQUARE = Geometry((32, 32), (0, 0), (32, 32))


def load(folder: Path) -> Family:
    return load_base(str(folder), dtype=torch.float32, device="cpu")


def test_families_are_recognised_by_their_index(base_folder: Callable) -> None:
    assert [family_of(str(base_folder(kind))) for kind in tiny.BASES] == ["sd", "sd", "sdxl", "sdxl"]
    assert family_of("anything", "sdxl") == "sdxl"


def test_what_is_no_base_model_is_told(tmp_path: Path) -> None:
    with pytest.raises(Problem, match=r"no folder .*nothing/here here"):
        family_of(str(tmp_path / "nothing" / "here"))
    with pytest.raises(Problem, match="cannot read model_index"):
        family_of(str(tmp_path))
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FooPipeline"}))
    with pytest.raises(Problem, match="no family for a FooPipeline"):
        family_of(str(tmp_path))
    with pytest.raises(Problem, match="did you mean 'sdxl'"):
        family_of(str(tmp_path), "sdlx")


def test_the_empty_prompt_of_sdxl_is_zeros_as_in_its_pipeline(base_folder: Callable) -> None:
    family = load(base_folder("sdxl"))
    text = family.encode_text(["a star", ""], [SQUARE] * 2)
    positive, negative, pooled, negative_pooled = family.pipeline.encode_prompt("a star", device="cpu")
    torch.testing.assert_close(text.context, torch.cat([positive, negative]))
    torch.testing.assert_close(text.extra["text_embeds"], torch.cat([pooled, negative_pooled]))
    assert not text.context[1].any()


def test_the_empty_prompt_of_sdxl_is_encoded_where_its_pipeline_encodes_it(base_folder: Callable) -> None:
    family = load(base_folder("sdxl"))
    family.pipeline.register_to_config(force_zeros_for_empty_prompt=False)
    text = family.encode_text(["a star", ""], [SQUARE] * 2)
    _, negative, _, negative_pooled = family.pipeline.encode_prompt("a star", device="cpu")
    torch.testing.assert_close(text.context[1:], negative)
    torch.testing.assert_close(text.extra["text_embeds"][1:], negative_pooled)


def test_the_empty_prompt_of_sd_is_the_encoding_of_nothing(base_folder: Callable) -> None:
    family = load(base_folder("sd1"))
    _, negative = family.pipeline.encode_prompt("a star", "cpu", 1, True)
    torch.testing.assert_close(family.encode_text([""], [SQUARE]).context, negative)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", tiny.BASES)
def test_texts_are_encoded_as_the_pipeline_encodes_prompts(
    base_folder: Callable, kind: tiny.Base, masked: bool
) -> None:
    """Texts longer than the encoder takes, and encoders that ask for the mask of padding, among them."""
    family = load(base_folder(kind))
    family.pipeline.text_encoder.config.use_attention_mask = masked and "sdxl" not in kind  # SDXL's pipeline never asks
    texts = ["a star", "two words " * 100, "  spaces, UPPER case and é  "]
    expected = (
        family.pipeline.encode_prompt(texts, family.pipeline.device, 1, False)
        if "sdxl" not in kind
        else (family.pipeline.encode_prompt(texts, device="cpu", do_classifier_free_guidance=False))
    )
    found = family.encode_text(texts, [SQUARE] * 3)
    assert torch.equal(found.context, expected[0])
    if "sdxl" in kind:
        assert torch.equal(found.extra["text_embeds"], expected[2])


def test_micro_conditioning_is_the_pipelines(base_folder: Callable) -> None:
    family = load(base_folder("sdxl"))
    geometry = Geometry((48, 64), (3, 5), (32, 40))
    ids = family.encode_text(["a"], [geometry]).extra["time_ids"]
    expected = family.pipeline._get_add_time_ids((48, 64), (3, 5), (32, 40), torch.float32, 64)
    assert torch.equal(ids, expected)


@pytest.mark.parametrize("kind", tiny.BASES)
def test_latents_are_the_scaled_posterior_sample(base_folder: Callable, kind: tiny.Base) -> None:
    family = load(base_folder(kind))
    pixels = torch.rand(2, 3, 32, 40) * 2 - 1
    noise = torch.randn(2, *family.latent_shape(32, 40))
    vae = family.pipeline.vae
    posterior = vae.encode(pixels).latent_dist
    expected = (posterior.mean + posterior.std * noise) * vae.config.scaling_factor
    torch.testing.assert_close(family.sample_latents(family.encode_moments(pixels), noise), expected)


def test_frozen_parts_stay_frozen(base_folder: Callable) -> None:
    family = load(base_folder("sd2v"))
    parts = [p for p in family.pipeline.components.values() if isinstance(p, torch.nn.Module)]
    assert parts and not any(q.requires_grad for p in parts for q in p.parameters())


def test_resting_text_encoders_come_back_for_prompts_only(
    base_folder: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, moved = load(base_folder("sdxl")), []
    for encoder in family.text_encoders:
        monkeypatch.setattr(encoder, "to", lambda device: moved.append(str(device)))
    with family.reading_prompts():
        pass
    assert moved == [], "where they do not rest, nothing moves"
    family.rest_text_encoders()
    family.denoiser.to("meta")
    with family.reading_prompts():
        assert moved == ["cpu", "cpu", "meta", "meta"]
    assert moved[4:] == ["cpu", "cpu"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_autoencoder_lies_channels_last_in_half_precision(base_folder: Callable, dtype: torch.dtype) -> None:
    folder = base_folder("sd1")
    family = load_base(str(folder), dtype=dtype, device="cpu")
    weight = family.autoencoder.encoder.conv_in.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) == (dtype != torch.float32)
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = family.encode_moments(pixels)
    family.autoencoder.to(memory_format=torch.contiguous_format)
    tolerance = {"rtol": 0, "atol": 0} if dtype == torch.float32 else {"rtol": 5e-2, "atol": 5e-2}
    torch.testing.assert_close(found, family.encode_moments(pixels), **tolerance)
