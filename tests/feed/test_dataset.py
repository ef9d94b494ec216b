"""Samples: pure functions of (seed, index, row), target and prompt from the same pixels, broken rows replaced."""

from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ip_adapter_trainer.core.errors import DataProblem
from ip_adapter_trainer.feed.config import DataConfig
from ip_adapter_trainer.feed.dataset import MAX_TRIES, drops
from tests.manifest.rows import NO_DROPS, Sample, Singly, number_of, training_set, write_manifest, write_pictures


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    return write_manifest(tmp_path, write_pictures(tmp_path, 6))


def _same(one: Sample, other: Sample) -> bool:
    return torch.equal(one.inputs.pixels, other.inputs.pixels) and torch.equal(
        one.inputs.prompts["image"], other.inputs.prompts["image"]
    )


def _faces_left(pixels: torch.Tensor) -> bool:
    """Whether the red ramp of [3, H, W] was mirrored."""
    return bool(pixels[0, :, 0].mean() > pixels[0, :, -1].mean())


def test_a_sample_is_cut_from_its_row(manifest: Path) -> None:
    sample = training_set(manifest)[7, 3]
    assert (sample.index, sample.row, sample.text) == (7, 3, "picture 3.png")
    assert sample.inputs.pixels.shape == (3, 32, 32) and sample.inputs.prompts["image"].shape == (3, 16, 16)
    assert number_of(sample.inputs.pixels) == 3 and sample.geometry.original_px == (32, 48)
    assert sample.geometry.crop_px == (0, 8) and sample.geometry.target_px == (32, 32) and not sample.faults


def test_samples_are_functions_of_seed_index_and_row(manifest: Path) -> None:
    chance = {"random_flip": True, "center_crop": False, "prompt_crop_min_share": 0.3, "prompt_flip": True}
    one, other, seeded = (training_set(manifest, seed=seed, **chance) for seed in (0, 0, 1))
    other[5, 1]
    assert all(_same(one[index, 2], other[index, 2]) for index in range(8))
    assert not all(_same(one[index, 2], one[index + 8, 2]) for index in range(8))
    assert not all(_same(one[index, 2], seeded[index, 2]) for index in range(8))


def test_of_several_captions_each_index_draws_one(tmp_path: Path) -> None:
    names, chance = write_pictures(tmp_path, 2), {"random_flip": True, "center_crop": False, "text_drop_rate": 0.2}
    single = [training_set(write_manifest(tmp_path, names), **chance)[index, 1] for index in range(90)]
    manifest = write_manifest(tmp_path, names, text=["one", ["a", "b", None]])
    one, other, seeded = (training_set(manifest, seed=seed, **chance) for seed in (0, 0, 1))
    alone = [one[index, 1] for index in range(90)]
    batches = [other.batch([(first + n, 1) for n in range(10)]) for first in range(80, -1, -10)]
    together = [text for batch in batches[::-1] for text in batch.text]
    assert [sample.text for sample in alone] == together, "whatever the batch, and whatever was drawn before"
    assert [sample.text for sample in alone] != [seeded[index, 1].text for index in range(90)]
    kept = [sample for sample in alone if not sample.drop_text]
    assert min(Counter(sample.text for sample in kept).values()) > 12 and {s.text for s in kept} == {"a", "b", ""}
    assert all(_same(*pair) and pair[0].drop_text == pair[1].drop_text for pair in zip(single, alone, strict=True))


def test_flips_take_target_and_prompt_along(manifest: Path) -> None:
    samples = training_set(manifest, random_flip=True)
    flips = [
        (_faces_left(s.inputs.pixels), _faces_left(s.inputs.prompts["image"]))
        for s in (samples[i, 0] for i in range(40))
    ]
    assert all(target == prompt for target, prompt in flips) and 8 < sum(target for target, _ in flips) < 32


def test_prompts_may_flip_alone(manifest: Path) -> None:
    samples = training_set(manifest, prompt_flip=True)
    flips = [
        (_faces_left(s.inputs.pixels), _faces_left(s.inputs.prompts["image"]))
        for s in (samples[i, 0] for i in range(40))
    ]
    assert not any(target for target, _ in flips) and 8 < sum(prompt for _, prompt in flips) < 32


def test_another_prompt_picture_is_taken_and_not_flipped_with_the_target(tmp_path: Path) -> None:
    names = write_pictures(tmp_path, 3)
    samples = training_set(write_manifest(tmp_path, names, prompt_image_file=[names[2], None, ""]), random_flip=True)
    for index in range(12):
        sample = samples[index, 0]
        assert number_of(sample.inputs.pixels) == 0 and number_of(sample.inputs.prompts["image"] / 127.5 - 1) == 2
        assert not _faces_left(sample.inputs.prompts["image"])
        assert number_of(samples[index, 1].inputs.prompts["image"] / 127.5 - 1) == 1


def test_target_and_prompt_lie_on_the_same_ground(tmp_path: Path) -> None:
    Image.new("RGBA", (32, 32), (200, 0, 0, 0)).save(tmp_path / "clear.png")
    sample = training_set(write_manifest(tmp_path, ["clear.png"]), alpha_background="#00ff00")[0, 0]
    for pixels in (sample.inputs.pixels, sample.inputs.prompts["image"] / 127.5 - 1):
        assert pixels.amax(dim=(1, 2)).tolist() == [-1, 1, -1]


def test_random_crops_move_and_random_parts_shrink(manifest: Path) -> None:
    lefts = Counter(training_set(manifest, center_crop=False)[index, 0].geometry.crop_px[1] for index in range(60))
    assert min(lefts) <= 1 and max(lefts) >= 15 and len(lefts) > 10
    whole, part = training_set(manifest), training_set(manifest, prompt_crop_min_share=0.2)
    spans = [float(np.ptp(samples[5, 0].inputs.prompts["image"][0].numpy())) for samples in (whole, part)]
    assert spans[1] < spans[0]


def test_padding_shows_the_encoder_the_whole_picture(manifest: Path) -> None:
    prompt = training_set(manifest, prompt_pad_square=True, alpha_background="black")[0, 5].inputs.prompts["image"]
    assert prompt[:, 0].max() == 0 and prompt[:, -1].max() == 0 and prompt[0, 8].max() > 200


def test_one_number_decides_what_is_dropped() -> None:
    config = DataConfig(data_json_file="d", image_drop_rate=0.1, text_drop_rate=0.2, both_drop_rate=0.3)
    dropped = {draw: drops(draw, config) for draw in (0.0, 0.09, 0.11, 0.29, 0.31, 0.59, 0.61, 0.99)}
    image, text, both, none = (False, True), (True, False), (True, True), (False, False)
    assert list(dropped.values()) == [image, image, text, text, both, both, none, none]


def test_drops_come_as_often_as_told(manifest: Path) -> None:
    samples = training_set(manifest, image_drop_rate=0.1, text_drop_rate=0.2, both_drop_rate=0.3)
    seen = Counter((s.drop_text, s.drop_image) for s in (samples[index, 0] for index in range(600)))
    for kind, share in {(False, True): 0.1, (True, False): 0.2, (True, True): 0.3, (False, False): 0.4}.items():
        assert abs(seen[kind] / 600 - share) < 0.06


def test_a_broken_row_gives_way_to_the_next_and_leaves_its_fault(manifest: Path) -> None:
    whole = training_set(manifest, random_flip=True)
    expected = whole[11, 0]
    for name in ("4.png", "5.png"):
        (manifest.parent / name).write_bytes(b"\x89PNG nonsense")
    sample = training_set(manifest, random_flip=True)[11, 4]
    assert sample.row == 0 and sample.index == 11 and sample.text == "picture 0.png" and _same(sample, expected)
    places = ["data.json, element 5 (4.png)", "data.json, element 6 (5.png)"]
    assert [(f.kind, f.where) for f in sample.faults] == [("damaged", where) for where in places]


def test_a_row_whose_prompt_picture_is_missing_is_replaced(tmp_path: Path) -> None:
    names = write_pictures(tmp_path, 2)
    sample = training_set(write_manifest(tmp_path, names, prompt_image_file=["none.png", None]))[0, 0]
    assert sample.row == 1 and [fault.kind for fault in sample.faults] == ["missing_file"]


def test_names_no_file_can_have_are_faults(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to("/")
    names = [*write_pictures(tmp_path, 1), "n" * 4000, "0.png/x.png", "out/etc/hostname"]
    samples = training_set(write_manifest(tmp_path, names))
    assert [f.kind for f in samples[0, 1].faults] == ["unreadable", "unreadable", "unsafe_path"]


def test_replacements_stay_in_the_bucket(tmp_path: Path) -> None:
    names = write_pictures(tmp_path, 6, sizes=((32, 32), (24, 48)))
    manifest = write_manifest(tmp_path, names)
    buckets = {"aspect_ratio_buckets": True}
    first = training_set(manifest, **buckets)
    assert [first.bucketing.size_px(row) for row in (0, 1)] == [(32, 32), (24, 40)]
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:70])  # the header is whole
    samples = training_set(manifest, **buckets)
    assert samples[0, 1].row == 3 and samples[0, 1].inputs.pixels.shape == (3, 24, 40)


def test_too_many_broken_rows_in_turn_are_a_problem(tmp_path: Path) -> None:
    names = write_pictures(tmp_path, MAX_TRIES + 3)
    for name in names[:-1]:
        (tmp_path / name).unlink()
    samples = training_set(write_manifest(tmp_path, names))
    assert samples[0, 5].row == MAX_TRIES + 2
    with pytest.raises(DataProblem, match=f"{MAX_TRIES} rows in turn"):
        samples[0, 0]


def test_a_manifest_without_a_sound_row_is_a_problem(tmp_path: Path) -> None:
    with pytest.raises(DataProblem, match="'\\.\\.'"):
        training_set(write_manifest(tmp_path, ["../a.png"]))


def test_a_batch_is_its_samples_stacked_and_empties_dropped_texts(manifest: Path) -> None:
    samples = training_set(manifest, **(NO_DROPS | {"text_drop_rate": 0.5}))
    batch = samples.batch([(index, index % 6) for index in range(8)])
    for index in range(8):
        alone, stack = samples[index, index % 6].inputs, batch.inputs
        assert torch.equal(alone.pixels, stack.pixels[index])
        assert torch.equal(alone.prompts["image"], stack.prompts["image"][index])
    assert (
        len(batch) == 8
        and batch.inputs.pixels.shape == (8, 3, 32, 32)
        and batch.inputs.prompts["image"].shape == (8, 3, 16, 16)
    )
    assert batch.index.tolist() == list(range(8)) and batch.index.dtype == torch.int64
    assert batch.drop_text.dtype == torch.bool and batch.drop_text.any() and not batch.drop_text.all()
    for text, dropped, row in zip(batch.text, batch.drop_text.tolist(), batch.row.tolist(), strict=True):
        assert text == ("" if dropped else f"picture {row}.png")
    assert not batch.drop_image.any() and len(batch.geometry) == 8


def test_it_travels_to_other_processes(manifest: Path) -> None:
    samples = training_set(manifest)
    copy: Singly = pickle.loads(pickle.dumps(samples))
    assert _same(copy[3, 4], samples[3, 4]) and len(copy) == 6
