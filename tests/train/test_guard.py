"""A resumed run is the run that it was, or says what it is otherwise."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from ip_adapter_trainer.config import parse_train
from ip_adapter_trainer.core.errors import Problem
from ip_adapter_trainer.manifest.fingerprint import Digest
from ip_adapter_trainer.train import checkpoint, guard
from ip_adapter_trainer.train.model_hashes import SAMPLES, compared, hash_models
from tests.test_model import build

Flags = Callable[..., list[str]]


def of(*rows: str, images: int = 4, models: Mapping[str, str] | None = None) -> guard.RunIdentity:
    digest = Digest()
    for row in rows:
        digest.add(row.encode())
    return guard.RunIdentity(digest.fingerprint(), lambda row: f"line {row + 1}", models or {}, images, world=2)


def saved(config: Any, identity: guard.RunIdentity, **changed: Any) -> dict[str, Any]:
    state = json.loads(json.dumps({"config": config.model_dump(mode="json"), **identity.to_json()}))
    return {**state, "config": state["config"] | changed}


def test_a_checkpoint_from_before_a_setting_did_what_was_done_then(flags: Flags, tmp_path: Path) -> None:
    config, here = parse_train(flags(tmp_path, timestep_density="uniform")), of("a")
    state = saved(config, here)
    for name in ("timestep_density", "timestep_uniform_share", "timestep_shift", "logit_mean", "logit_std"):
        del state["config"][name]
    del state["config"]["validation_share"]
    assert guard.check(state, config, here) == []
    with pytest.raises(Problem, match="timestep_density was 'uniform', is 'logit_normal'"):
        guard.check(state, parse_train(flags(tmp_path)), here)
    with pytest.raises(Problem, match=r"validation_share was 0.0, is 0.01(.|\n)*give --validation_share=0.0"):
        guard.check(state, config.model_copy(update={"validation_share": 0.01}), here)


def test_a_checkpoint_older_than_a_setting_had_its_default(flags: Flags, tmp_path: Path) -> None:
    config, here = parse_train(flags(tmp_path, min_timestep=0)), of("a")
    state = saved(config, here)
    del state["config"]["min_timestep"]
    guard.check(state, config, here)
    with pytest.raises(Problem, match="min_timestep was 0, is 400"):
        guard.check(state, config.model_copy(update={"min_timestep": 400}), here)


def test_one_message_names_every_difference_and_the_ways_on(flags: Flags, tmp_path: Path) -> None:
    config = parse_train(flags(tmp_path, seed=7, num_tokens=6))
    state = saved(config, of("a", "b", images=8, models={"unet": "fp32:1"}), seed=0, num_tokens=4)
    with pytest.raises(Problem) as caught:
        guard.check(state, config, of("a", "c", models={"unet": "fp32:2"}))
    assert caught.value.fault.what == (
        "this run cannot be resumed as another one: num_tokens was 4, is 6; seed was 0, is 7; the training rows "
        "changed (of 2 rows one changed, row 2, now line 2); other weights or settings than before: unet; "
        "a step had 8 images and would have 4"
    )
    for way in ("give --seed=0", "give --num_tokens=4", "restore the manifest", "give --train_batch_size=4"):
        assert way in caught.value.fault.remedy
    assert "--accept_changed" not in caught.value.fault.remedy, "tokens and batch cannot be accepted"


def test_what_can_be_accepted_is_told_and_given_back(
    flags: Flags, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = parse_train(flags(tmp_path, seed=7))
    state = saved(config, of("a", "b"), seed=0)
    with pytest.raises(Problem, match="go on deliberately with --accept_changed seed rows"):
        guard.check(state, config, of("a", "c"))
    with pytest.raises(Problem, match="rows changed"):
        guard.check(state, config.model_copy(update={"accept_changed": ("seed",)}), of("a", "c"))
    told = guard.check(state, config.model_copy(update={"accept_changed": ("seed", "rows")}), of("a", "c"))
    assert [what.split()[0] for what in told] == ["seed", "the"]
    assert capsys.readouterr().err.count("WARNING: resuming although") == 2


@pytest.mark.parametrize("name", ["sed", "num_tokens", "train_batch_size", "learning_rate"])
def test_nothing_else_can_be_accepted(flags: Flags, tmp_path: Path, name: str) -> None:
    config = parse_train([*flags(tmp_path), "--accept_changed", name])
    with pytest.raises(Problem, match=f"{name!r} is nothing that a resumed run can accept"):
        guard.check(saved(config, of("a")), config, of("a"))


def test_what_may_change_is_told(flags: Flags, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = parse_train(flags(tmp_path, learning_rate=5e-5))
    assert guard.check(saved(config, of("a"), learning_rate=1e-4, save_steps=9), config, of("a")) == []
    assert capsys.readouterr().err == "resuming with learning_rate 5e-05 (was 0.0001)\n"


def test_a_run_that_accepts_keeps_what_it_accepted(run: Callable, tmp_path: Path) -> None:
    output = run(tmp_path / "out", max_train_steps=2)
    with pytest.raises(Problem, match="a step had 2 images and would have 4"):
        run(output, train_batch_size=4, resume_from_checkpoint="latest")
    with pytest.raises(Problem, match="seed was 0, is 7"):
        run(output, seed=7, max_train_steps=4, resume_from_checkpoint="latest")
    run(output, seed=7, max_train_steps=4, resume_from_checkpoint="latest", accept_changed="seed")
    run(output, seed=7, max_train_steps=5, resume_from_checkpoint="latest")
    state = checkpoint.read(output / "checkpoint-5").state
    assert state["accepted"] == ["at step 2: seed was 0, is 7"]


def test_changed_rows_are_refused(run: Callable, rows_folder: Path, tmp_path: Path) -> None:
    output = run(tmp_path / "out", max_train_steps=2)
    rows = json.loads((rows_folder / "data.json").read_text())
    rows[3]["text"] = "a moon"
    other = tmp_path / "other.json"
    other.write_text(json.dumps(rows))
    with pytest.raises(Problem, match=r"one changed, row 4, now other.json, element 4"):
        run(output, data_json_file=other, resume_from_checkpoint="latest")


def test_nothing_is_loaded_for_a_run_that_is_refused(
    run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ip_adapter_trainer.train import run as running

    output = run(tmp_path / "out", max_train_steps=2)
    monkeypatch.setattr(running, "make_model", lambda *_: pytest.fail("loaded"))
    for asked in ("latest", output / "checkpoint-2"):
        with pytest.raises(Problem, match="seed was 0, is 7"):
            run(output, seed=7, resume_from_checkpoint=asked)


def test_marks_tell_models_apart(base_folder: Callable, encoder_folder: Path) -> None:
    model = build(base_folder("sd1"), encoder_folder, "base")
    model_hashes = hash_models(model)
    assert set(model_hashes) == {"unet", "vae", "text_encoder", "image_encoder", "scheduler"}
    assert hash_models(build(base_folder("sd1"), encoder_folder, "base")) == model_hashes
    with torch.no_grad():
        weight = model.denoiser.net.conv_in.weight  # type: ignore[attr-defined]
        assert weight.numel() > SAMPLES
        weight.mul_(1.001)
    model.denoiser.pipeline.scheduler.register_to_config(beta_end=0.5)
    assert compared(model_hashes, hash_models(model)) == (["unet", "scheduler"], [])
    model.denoiser.net.half()
    assert compared(model_hashes, hash_models(model)) == (["scheduler"], ["unet"])


def test_the_order_in_memory_does_not_matter(base_folder: Callable, encoder_folder: Path) -> None:
    model = build(base_folder("sd1"), encoder_folder, "base")
    model_hashes = hash_models(model)
    model.denoiser.net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert hash_models(model) == model_hashes
