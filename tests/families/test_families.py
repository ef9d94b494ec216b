"""What families feed the denoiser is what their pipelines feed it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ip_adapter_trainer.core.errors import Problem
from ip_adapter_trainer.core.values import Geometry
from ip_adapter_trainer.families import BaseModel
from ip_adapter_trainer.loading.base import family_of, load_base
from tests import tiny


def load(folder: Path) -> BaseModel:
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
    base = load(base_folder("sdxl"))
    text = base.codec.text(["a star", ""])
    positive, negative, pooled, negative_pooled = base.denoiser.pipeline.encode_prompt("a star", device="cpu")
    torch.testing.assert_close(text["context"], torch.cat([positive, negative]))
    torch.testing.assert_close(text["text_embeds"], torch.cat([pooled, negative_pooled]))
    assert not text["context"][1].any()


def test_the_empty_prompt_of_sdxl_is_encoded_where_its_pipeline_encodes_it(base_folder: Callable) -> None:
    base = load(base_folder("sdxl"))
    pipeline = base.denoiser.pipeline
    pipeline.register_to_config(force_zeros_for_empty_prompt=False)
    text = base.codec.text(["a star", ""])
    _, negative, _, negative_pooled = pipeline.encode_prompt("a star", device="cpu")
    torch.testing.assert_close(text["context"][1:], negative)
    torch.testing.assert_close(text["text_embeds"][1:], negative_pooled)


def test_the_empty_prompt_of_sd_is_the_encoding_of_nothing(base_folder: Callable) -> None:
    base = load(base_folder("sd1"))
    _, negative = base.denoiser.pipeline.encode_prompt("a star", "cpu", 1, True)
    torch.testing.assert_close(base.codec.text([""])["context"], negative)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", tiny.BASES)
def test_texts_are_encoded_as_the_pipeline_encodes_prompts(
    base_folder: Callable, kind: tiny.Base, masked: bool
) -> None:
    """Texts longer than the encoder takes, and encoders that ask for the mask of padding, among them."""
    base = load(base_folder(kind))
    pipeline, is_sdxl = base.denoiser.pipeline, "sdxl" in kind
    pipeline.text_encoder.config.use_attention_mask = masked and not is_sdxl  # SDXL's pipeline never asks
    texts = ["a star", "two words " * 100, "  spaces, UPPER case and é  "]
    expected = (
        pipeline.encode_prompt(texts, device="cpu", do_classifier_free_guidance=False)
        if is_sdxl
        else pipeline.encode_prompt(texts, pipeline.device, 1, False)
    )
    found = base.codec.text(texts)
    assert torch.equal(found["context"], expected[0])
    assert set(found) == ({"context", "text_embeds"} if is_sdxl else {"context"})
    if is_sdxl:
        assert torch.equal(found["text_embeds"], expected[2])


@pytest.mark.parametrize("kind", tiny.BASES)
def test_prompts_are_handed_to_the_pipeline_as_it_would_encode_them(base_folder: Callable, kind: tiny.Base) -> None:
    """A prompt that says nothing is encoded; the unconditional of SDXL is zeros, or the encoding of a negative prompt.

    All bit for bit, since a picture at scale 0 is the base model's own.
    """
    base = load(base_folder(kind))
    pipeline, prompts = base.denoiser.pipeline, ["a star", "", "two words"]
    for negative in ("", "a circle"):
        asked = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
        expected = pipeline.encode_prompt(prompts, **asked, negative_prompt=[negative] * 3 if negative else None)
        positive, unconditional = base.codec.prompts(prompts), base.codec.text([negative] * 3)
        found = base.denoiser.sampling(positive, unconditional)
        names = ["prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"]
        assert list(found) == names[: len(expected)]
        assert all(torch.equal(found[name], tensor) for name, tensor in zip(names, expected, strict=False))
        alone = base.denoiser.sampling(positive, None)
        assert [name for name, tensor in alone.items() if tensor is None] == names[1 : len(expected) : 2]


def test_micro_conditioning_is_the_pipelines(base_folder: Callable) -> None:
    base, given = load(base_folder("sdxl")), {}
    geometry = Geometry((48, 64), (3, 5), (32, 40))
    base.denoiser.net.register_forward_pre_hook(lambda *call: given.update(call[2]), with_kwargs=True)
    base.denoiser.predict(torch.zeros(1, 4, 8, 10), torch.tensor([5]), base.codec.text(["a"]), [geometry])
    expected = base.denoiser.pipeline._get_add_time_ids((48, 64), (3, 5), (32, 40), torch.float32, 64)
    assert torch.equal(given["added_cond_kwargs"]["time_ids"], expected)


@pytest.mark.parametrize("kind", tiny.BASES)
def test_latents_are_the_scaled_posterior_sample(base_folder: Callable, kind: tiny.Base) -> None:
    codec = load(base_folder(kind)).codec
    pixels = torch.rand(2, 3, 32, 40) * 2 - 1
    noise = torch.randn(2, *codec.latent_shape(32, 40))
    vae = codec.autoencoder
    posterior = vae.encode(pixels).latent_dist
    expected = (posterior.mean + posterior.std * noise) * vae.config.scaling_factor
    torch.testing.assert_close(codec.latents(codec.moments(pixels), noise), expected)


def test_frozen_parts_stay_frozen(base_folder: Callable) -> None:
    pipeline = load(base_folder("sd2v")).denoiser.pipeline
    parts = [p for p in pipeline.components.values() if isinstance(p, torch.nn.Module)]
    assert parts and not any(q.requires_grad for p in parts for q in p.parameters())


def test_resting_text_encoders_come_back_for_prompts_only(
    base_folder: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec, moved = load(base_folder("sdxl")).codec, []
    for encoder in codec.text_encoders:
        monkeypatch.setattr(encoder, "to", lambda device: moved.append(str(device)))
    with codec.awake():
        pass
    assert moved == [], "where they do not rest, nothing moves"
    codec.rest_text_encoders()
    monkeypatch.setattr(type(codec), "device", torch.device("meta"))
    with codec.awake():
        assert moved == ["cpu", "cpu", "meta", "meta"]
    assert moved[4:] == ["cpu", "cpu"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_autoencoder_lies_channels_last_in_half_precision(base_folder: Callable, dtype: torch.dtype) -> None:
    folder = base_folder("sd1")
    codec = load_base(str(folder), dtype=dtype, device="cpu").codec
    weight = codec.autoencoder.encoder.conv_in.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) == (dtype != torch.float32)
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = codec.moments(pixels)
    codec.autoencoder.to(memory_format=torch.contiguous_format)
    tolerance = {"rtol": 0, "atol": 0} if dtype == torch.float32 else {"rtol": 5e-2, "atol": 5e-2}
    torch.testing.assert_close(found, codec.moments(pixels), **tolerance)
