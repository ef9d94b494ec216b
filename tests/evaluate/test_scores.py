"""`ip-adapter evaluate`: cosines that are what they are called, pairs, and the shape of what is written."""

from __future__ import annotations

import errno
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ip_adapter_trainer.core.errors import DataProblem, Problem, StorageProblem
from ip_adapter_trainer.evaluate import scores, start
from ip_adapter_trainer.evaluate.clip import ClipScorer, clip_i, clip_t
from ip_adapter_trainer.evaluate.config import EvaluateConfig
from ip_adapter_trainer.evaluate.report import Evaluation, Measure
from ip_adapter_trainer.evaluate.sample import Sampling
from ip_adapter_trainer.evaluate.scores import DrawPlan, evaluate, score
from ip_adapter_trainer.model import Features, Model
from tests import tiny
from tests.evaluate.things import CAPTIONS, image


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_scorer(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def clip(clip_folder: Path) -> ClipScorer:
    return ClipScorer.load(str(clip_folder), torch.device("cpu"))


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A manifest of six rows, of which one has no caption and one prompts with another picture."""
    entries = [{"image_file": f"{n}.png", "text": CAPTIONS[n]} for n in range(6)]
    entries[4]["prompt_image_file"] = "9.png"
    for number in (*range(6), 9):
        image(number).save(tmp_path / f"{number}.png")
    (tmp_path / "data.json").write_text(json.dumps(entries))
    return tmp_path / "data.json"


def settings(rows: Path, clip_folder: Path, **changes: object) -> EvaluateConfig:
    asked = {
        "adapter": "adapter.bin", "data_json_file": str(rows), "output": str(rows.parent / "scores.json"),
        "clip_model": str(clip_folder), "device": "cpu", "num_images_per_prompt": 2, "num_inference_steps": 1,
    }  # fmt: skip
    return EvaluateConfig(**(asked | changes))


def test_equal_pictures_have_clip_i_one_and_clip_t_is_clipscore(clip: ClipScorer) -> None:
    one, two = clip.images([image(1), image(2)])
    assert clip_i(one, one).item() == pytest.approx(1, abs=1e-6) and clip_i(one, two) < 0.9999
    text = clip.texts(["a red star"])[0]
    cosine = torch.nn.functional.cosine_similarity(one, text, dim=0)
    assert clip_t(one, text).item() == pytest.approx(2.5 * max(cosine.item(), 0), abs=1e-6)
    assert clip_t(one, -one) == 0 and clip_t(one, one).item() == pytest.approx(2.5, abs=1e-5)
    assert clip.texts(["word " * 500]).shape == clip.texts([""]).shape


def test_captions_that_the_scorer_cuts_are_told(clip: ClipScorer) -> None:
    texts = ["", "star " * 14, "star " * 15]
    assert torch.equal(clip.texts(texts[2:]), clip.texts(["star " * 14])) and clip.cuts(texts[:2]) == ""
    assert clip.cuts(texts).startswith("the CLIP model cuts 1 of 3 captions at 14 tokens")


def copied(model: Model, features: Features, prompts: Sequence[str], seeds: Sequence[int], how: Sampling, poll: object
           ) -> list[Image.Image]:  # fmt: skip
    """Sampling by a perfect adapter: the picture whose features these are."""
    known = scores.image_features(model, [[image(n)] for n in (*range(6), 9)])
    (need,) = features
    nearest = (features[need][:, None] - known[need][None]).abs().flatten(2).sum(2).argmin(1)
    nearest = nearest.repeat_interleave(len(prompts) // len(nearest))
    return [image([*range(6), 9][int(n)] if how.scale else 77) for n in nearest]


def test_a_perfect_adapter_scores_one_and_gains_over_both(
    sd1: Model, clip_folder: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(start, "load_model", lambda *_: sd1)
    monkeypatch.setattr(scores, "sample", copied)
    found = evaluate(settings(rows, clip_folder))
    own, gains = found.scores["image_prompt"]["clip_i"], found.gains
    assert own is not None and own.mean == pytest.approx(1, abs=1e-5) and own.rows == 6
    for how in ("scale_0", "shuffled"):
        gain, other = gains[how]["clip_i"], found.scores[how]["clip_i"]
        assert (
            gain is not None
            and other is not None
            and gain.mean == pytest.approx(1 - other.mean, abs=1e-5)
            and gain.mean > 0
        )
    by_caption = found.scores["image_prompt"]["clip_t"]
    assert by_caption is not None and by_caption.rows == 5, "a row without caption has no CLIP-T"


def test_the_file_holds_what_is_printed(
    sd1: Model, clip_folder: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(start, "load_model", lambda *_: sd1)
    config = settings(rows, clip_folder, num_rows=3, batch_size=4)
    found = evaluate(config)
    written = json.loads(Path(config.output).read_text())
    assert written == json.loads(json.dumps(asdict(found)))
    assert set(written) == {"protocol", "scores", "gains", "faults", "seconds"}
    assert set(written["scores"]) == {"image_prompt", "scale_0", "shuffled"}
    assert set(written["gains"]) == {"scale_0", "shuffled"}
    assert set(written["scores"]["shuffled"]["clip_i"]) == {"mean", "standard_error", "rows"}
    assert written["protocol"]["clip_model"] == str(clip_folder) and written["protocol"]["rows"] == 3
    assert str(clip_folder) in str(found) and "image prompt over shuffled" in str(found)
    again = evaluate(config)
    assert again.scores == found.scores and not sd1.is_attached


def test_rows_may_be_drawn_together_or_alone(sd1: Model, clip: ClipScorer, rows: Path, clip_folder: Path) -> None:
    prompts, faults = scores.read_prompts(settings(rows, clip_folder))
    assert faults == () and [p.number for p in prompts] == list(range(6))
    assert np.array_equal(np.asarray(prompts[4].read()), np.asarray(image(9)))
    together, alone = (
        score(sd1, clip, prompts[:3], DrawPlan(Sampling(32, 32, steps=1, batch_images=n), pictures=2)) for n in (6, 1)
    )
    for how, metrics in together.items():
        for name, values in metrics.items():
            np.testing.assert_allclose(values, alone[how][name], atol=2e-3)


def test_of_several_captions_the_seed_draws_the_one_that_is_scored(rows: Path, clip_folder: Path) -> None:
    entries = json.loads(rows.read_text())
    rows.write_text(json.dumps([entry | {"text": ["a", "b", "c"]} for entry in entries]))
    drawn = [
        {p.number: p.caption for p in scores.read_prompts(settings(rows, clip_folder, seed=seed, num_rows=count))[0]}
        for seed, count in ((0, 6), (0, 3), (1, 6))
    ]
    assert drawn[1].items() < drawn[0].items() and drawn[0] != drawn[2] and set(drawn[0].values()) <= {*"abc"}


def test_unreadable_rows_are_left_out_up_to_the_limit(rows: Path, clip_folder: Path) -> None:
    (rows.parent / "2.png").write_bytes(b"")
    prompts, faults = scores.read_prompts(settings(rows, clip_folder))
    assert [p.number for p in prompts] == [0, 1, 3, 4, 5] and [f.kind for f in faults] == ["empty_file"]
    (rows.parent / "3.png").unlink()
    with pytest.raises(DataProblem, match="2 of 6 rows"):
        scores.read_prompts(settings(rows, clip_folder))
    rows.write_text(json.dumps([{"image_file": "2.png", "text": ""}]))
    with pytest.raises(DataProblem, match="none is left"):
        scores.read_prompts(settings(rows, clip_folder))


def test_rows_that_show_one_image_have_nothing_to_be_shuffled_with(
    sd1: Model, clip_folder: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows.write_text(json.dumps([{"image_file": name, "text": "a star"} for name in ("0.png", "./0.png")]))
    monkeypatch.setattr(start, "load_model", lambda *_: sd1)
    found = evaluate(settings(rows, clip_folder))
    assert found.scores["image_prompt"]["clip_i"] and not found.scores["shuffled"]["clip_i"]
    assert "images: 1, too few to judge by, 8 are needed; there is none to shuffle with" in str(found)


def test_faults_of_the_surroundings_are_told_first(rows: Path, clip_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(Problem, match="cannot write the scores"):
        evaluate(settings(rows, clip_folder, output=str(tmp_path)))
    with pytest.raises(Problem, match="CLIP model that scores"):
        evaluate(settings(rows, clip_folder, clip_model=str(tmp_path / "nothing")))


def test_a_full_disk_at_the_end_still_shows_the_scores(
    sd1: Model, clip_folder: Path, rows: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_room(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(start, "load_model", lambda *_: sd1)
    monkeypatch.setattr(Path, "write_text", no_room)
    config = settings(rows, clip_folder, num_rows=2)
    with pytest.raises(StorageProblem, match="No space left"):
        evaluate(config)
    assert "image prompt over scale 0" in capsys.readouterr().err and not Path(config.output).exists()


def test_measures_and_pairs() -> None:
    measure = Measure.of(np.array([1.0, np.nan, 3.0]))
    assert measure == Measure(2.0, pytest.approx(1.0), 2)
    assert Measure.of(np.array([np.nan])) is None and Measure.of(np.array([4.0])) == Measure(4.0, None, 1)
    drawn = {how: {"clip_i": np.array(v), "clip_t": np.full(2, np.nan)} for how, v in
             {"image_prompt": [3.0, 5.0], "scale_0": [1.0, 3.0], "shuffled": [0.0, 4.0]}.items()}  # fmt: skip
    how = {"scheduler": "ddim", "steps": 1, "guidance_scale": 1.0, "scale": 1.0}
    found = Evaluation.of(
        drawn, {"rows": 2, "images": 2, "pictures": 1, "seed": 0, "clip_model": "x", "how": how}, ["bad"], 1.0
    )
    assert found.gains["scale_0"]["clip_i"] == Measure(2.0, 0.0, 2), "pairs have less spread than their parts"
    assert found.gains["shuffled"] == {"clip_i": Measure(2.0, pytest.approx(1.0), 2), "clip_t": None}
    assert "faults: 1, the first: bad" in str(found) and "+2.0000 ± 0.0000" in str(found)
