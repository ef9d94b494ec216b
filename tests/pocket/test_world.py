"""The picture world and the oracle that reads it back."""

from __future__ import annotations

import numpy as np
import pytest

from ip_adapter_trainer.pocket import models, oracle, world, write
from ip_adapter_trainer.pocket.world import ATTRIBUTES, Scene
from tools.pocket import gates

built = pytest.mark.skipif(
    not (models.weights_dir() / "build.json").exists(), reason="the pocket weights are built by their own command"
)


def scenes(count: int, seed: int, held: bool | None = None) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [world.random_scene(rng, held=held) for _ in range(count)]


def test_the_oracle_reads_rendered_truth() -> None:
    drawn = scenes(600, seed=11)
    accuracy = oracle.accuracy(np.stack([world.render(s) for s in drawn]), [s.attributes() for s in drawn])
    assert accuracy.keys() == ATTRIBUTES.keys()
    assert min(accuracy.values()) >= 0.995, accuracy


def test_the_oracle_reads_through_noise_and_blur() -> None:
    drawn = scenes(100, seed=12)
    noise = np.random.default_rng(0).normal(0, 6, (100, world.SIZE_PX, world.SIZE_PX, 3))
    images = np.clip(np.stack([world.render(s) for s in drawn]) + noise, 0, 255)
    assert min(oracle.accuracy(images, [s.attributes() for s in drawn]).values()) >= 0.95


def test_the_oracle_is_at_chance_on_pictures_of_other_scenes() -> None:
    drawn = scenes(300, seed=13)
    images = np.stack([world.render(s) for s in drawn])
    wrong = oracle.accuracy(images, [s.attributes() for s in drawn[1:] + drawn[:1]])
    for name, values in ATTRIBUTES.items():
        assert wrong[name] < 1 / len(values) + 0.1


def test_the_oracle_refuses_other_sizes() -> None:
    with pytest.raises(ValueError, match="32x32"):
        oracle.read(np.zeros((64, 64, 3)))


def test_held_out_combinations_never_reach_training() -> None:
    assert not any(world.held_out(s) for s in scenes(500, seed=1, held=False))
    assert all(world.held_out(s) for s in scenes(100, seed=1, held=True))
    share = np.mean([world.held_out(s) for s in world.combinations()])
    assert 0.15 < share < 0.25
    assert len(gates.unseen_captions(0)) == gates.BASE_CAPTIONS
    for target, _ in write.training_pairs(0, 200):
        assert not world.held_out(target)


@pytest.mark.parametrize(("named", "text"), [
    (tuple(ATTRIBUTES), "a red striped star on a white background"), (("shape",), "a star"),
    (("colour",), "a red thing"), ((), ""), (("pattern", "background"), "a striped thing on a white background"),
])  # fmt: skip
def test_captions_name_what_is_asked(named: tuple[str, ...], text: str) -> None:
    assert world.caption(Scene("star", "red", "striped", "white"), named) == text


def test_every_caption_fits_the_text_encoder_and_comes_back_from_its_tokens() -> None:
    words = models.tokenizer()
    for scene in world.combinations():
        ids = words(world.caption(scene)).input_ids
        assert len(ids) <= models.MAX_TOKENS
        assert words.decode(ids, skip_special_tokens=True).split() == world.caption(scene).split()


def test_pairs_share_everything_but_shape_and_pose() -> None:
    for target, prompt in write.training_pairs(3, 50):
        assert {**target.attributes(), "shape": ""} == {**prompt.attributes(), "shape": ""}


@built
def test_the_packed_weights_are_small() -> None:
    total = sum(f.stat().st_size for f in models.weights_dir().rglob("*") if f.is_file())
    assert total <= 32_000_000


@built
def test_the_packed_autoencoder_keeps_every_attribute() -> None:
    assert min(gates.reconstruction(write.pipeline().vae, seed=5, count=200).values()) >= gates.AUTOENCODER_GATE


@built
def test_the_packed_image_encoder_can_be_read_linearly() -> None:
    assert min(gates.probe(write.clip(), seed=5, train=2000, test=300).values()) >= gates.ENCODER_GATE - 0.01


@built
def test_the_packed_base_draws_what_unseen_captions_say() -> None:
    assert min(gates.base_draws_text(write.pipeline(), seed=0, count=100).values()) >= gates.BASE_GATE
