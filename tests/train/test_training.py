"""Training itself: every family and variant learns, settings act, plans tell the truth."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from ip_adapter_trainer.config import parse_train
from ip_adapter_trainer.core.errors import Problem
from ip_adapter_trainer.model import Adapter
from ip_adapter_trainer.storage.checkpoints import all_checkpoints
from ip_adapter_trainer.train import checkpoint
from ip_adapter_trainer.train.config import OptimConfig
from ip_adapter_trainer.train.optim import Gradients, make_optimizer
from ip_adapter_trainer.train.posterior import noise_share


def weights(output: Path, step: int) -> dict[str, torch.Tensor]:
    return torch.load(output / f"checkpoint-{step}" / checkpoint.WEIGHTS, weights_only=True)


def losses(output: Path) -> list[float]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def test_overfitting_a_few_rows_lowers_the_validation_loss_and_opens_a_gap(run: Callable, tmp_path: Path) -> None:
    output = run(tmp_path / "out", max_train_steps=60, save_steps=100, validation_steps=30, learning_rate=3e-3,
                 num_validation_images=8, train_batch_size=6)  # fmt: skip
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    first, last = [row for row in rows if "training_rows/loss" in row]
    assert last["training_rows/loss"] < first["training_rows/loss"]


def test_the_same_seed_gives_the_same_run_and_another_seed_another(run: Callable, tmp_path: Path) -> None:
    a, b, c = (run(tmp_path / n, seed=s, max_train_steps=2) for n, s in (("a", 0), ("b", 0), ("c", 1)))
    assert (a / "metrics.jsonl").read_bytes() == (b / "metrics.jsonl").read_bytes()
    assert losses(a) != losses(c)


def test_accumulation_equals_the_larger_batch(run: Callable, tmp_path: Path) -> None:
    # So large an epsilon makes AdamW's step follow the gradient, where else it blows up the rounding of the smallest.
    plain = {"max_train_steps": 2, "optimizer": "adamw", "adam_epsilon": 1.0, "learning_rate": 1.0}
    whole = run(tmp_path / "whole", train_batch_size=4, **plain)
    split = run(tmp_path / "split", train_batch_size=2, gradient_accumulation_steps=2, **plain)
    for key, value in weights(whole, 2).items():
        torch.testing.assert_close(weights(split, 2)[key], value, rtol=1e-5, atol=1e-6)


def test_half_precision_keeps_fp32_masters_and_says_what_a_cpu_cannot(
    run: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = run(tmp_path / "out", mixed_precision="fp16", max_train_steps=2)
    assert "bf16 instead" in capsys.readouterr().err
    assert all(v.dtype == torch.float32 for v in weights(output, 2).values())


def test_recomputation_changes_memory_not_results(run: Callable, tmp_path: Path) -> None:
    plain = run(tmp_path / "plain", max_train_steps=2, variant="plus")
    again = run(tmp_path / "again", max_train_steps=2, variant="plus", gradient_checkpointing=True)
    for key, value in weights(plain, 2).items():
        torch.testing.assert_close(weights(again, 2)[key], value, rtol=1e-4, atol=1e-6)


SHORT: dict[str, object] = {"max_train_steps": 3, "num_validation_images": 0}


@pytest.fixture(scope="module")
def plain() -> dict[str, dict]:
    """Weights of a short run with nothing set, by variant."""
    return {}


@pytest.mark.parametrize("extra", [
    {"use_ema": True}, {"snr_gamma": 0.5}, {"noise_offset": 0.1}, {"lr_scheduler": "cosine"}, {"weight_decay": 0.5},
    {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 2}, {"max_grad_norm": 1e-3}, {"adam_beta1": 0.5},
    {"adam_beta2": 0.5}, {"adam_epsilon": 1e-3}, {"image_drop_rate": 0.9}, {"text_drop_rate": 0.9},
    {"both_drop_rate": 0.9}, {"random_flip": True}, {"prompt_flip": True}, {"prompt_crop_min_share": 0.3},
    {"timestep_density": "uniform"}, {"timestep_density": "cubic"}, {"timestep_density": "shifted"},
    {"timestep_uniform_share": 1.0}, {"logit_mean": -2.0}, {"logit_std": 3.0},
    {"prediction_type": "v_prediction"}, {"num_tokens": 3, "variant": "plus"},
    {"resampler_dim": 128, "variant": "plus"}, {"latents": "mean"}, {"clip_skip": 2},
    {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
    {"lr_scheduler": "polynomial", "lr_power": 3.0}, {"lr_scheduler": "cosine_with_restarts", "lr_num_cycles": 2},
], ids=lambda e: "-".join(e))  # fmt: skip
def test_every_setting_of_the_training_changes_it(
    run: Callable, tmp_path: Path, plain: dict[str, dict], extra: dict[str, object]
) -> None:
    variant = str(extra.get("variant", "base"))
    if variant not in plain:
        plain[variant] = weights(run(tmp_path / "plain", variant=variant, **SHORT), 3)
    a, b = plain[variant], weights(run(tmp_path / "other", **SHORT, **extra), 3)
    assert any(a[k].shape != b[k].shape or not torch.equal(a[k], b[k]) for k in a)


def test_a_dry_run_prints_the_plan_and_writes_nothing(
    run: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = run(tmp_path / "out", dry_run=True)
    said = capsys.readouterr().err
    assert "projector" in said and "images per step" in said and "checkpoint on disk" in said
    assert not output.exists()


def test_the_resolved_settings_run_again_from_yaml_and_give_the_same_run(run: Callable, tmp_path: Path) -> None:
    from ip_adapter_trainer.config import write_resolved
    from ip_adapter_trainer.train.run import train

    first = run(tmp_path / "first", max_train_steps=2, variant="plus")
    second = tmp_path / "second"
    train(parse_train(["--config", str(first / "config.yaml"), f"--output_dir={second}"]), write_resolved)
    assert (first / "metrics.jsonl").read_bytes() == (second / "metrics.jsonl").read_bytes()


def test_published_and_diffusers_names_are_taken(flags: Callable, tmp_path: Path) -> None:
    given: dict[str, object] = {"mixed_precision": "fp16", "num_train_epochs": 3, "dataloader_num_workers": 4}
    given |= {"weight_decay": 0.01, "local_rank": 0, "noise_offset": 0.1, "logging_dir": "logs"}
    given |= {"pretrained_ip_adapter_path": "x.bin"}
    published = flags(tmp_path, **given)
    config = parse_train([*published, "--num_tokens=4", "--checkpointing_steps=7"])
    assert config.save_steps == 7 and config.noise_offset == 0.1


def test_a_mistyped_setting_in_yaml_gets_a_hint(flags: Callable, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"save_stpes": 3}))
    with pytest.raises(Problem, match="did you mean 'save_steps'"):
        parse_train([*flags(tmp_path), "--config", str(file)])


def test_values_out_of_range_are_told_with_their_flag(flags: Callable, tmp_path: Path) -> None:
    with pytest.raises(Problem, match=r"33 is no multiple of 8.*\n.*--resolution"):
        parse_train(flags(tmp_path, resolution=33))
    with pytest.raises(Problem, match="sum to 1"):
        parse_train(flags(tmp_path, image_drop_rate=0.7, text_drop_rate=0.65))
    with pytest.raises(Problem, match="has no warm-up"):
        from ip_adapter_trainer.train.optim import make_optimizer, make_schedule

        config = parse_train(flags(tmp_path, lr_scheduler="constant", lr_warmup_steps=5))
        make_schedule(make_optimizer(Adapter(torch.nn.Linear(1, 1), {}), config), config, 10)


def test_starting_from_a_published_file_takes_its_weights(run: Callable, tmp_path: Path) -> None:
    first = run(tmp_path / "first", max_train_steps=2)
    file = first / "checkpoint-2" / checkpoint.WEIGHTS
    second = run(tmp_path / "second", max_train_steps=1, learning_rate=1e-12, pretrained_ip_adapter_path=file)
    for key, value in weights(first, 2).items():
        torch.testing.assert_close(weights(second, 1)[key], value, rtol=0, atol=1e-6)


def test_the_fused_optimizer_can_be_turned_off_at_a_resume(run: Callable, tmp_path: Path) -> None:
    for config, fused in ((OptimConfig(), True), (OptimConfig(fused_optimizer=False), None)):
        assert make_optimizer(Adapter(torch.nn.Linear(1, 1), {}), config).defaults["fused"] is fused
    whole = run(tmp_path / "whole")
    shutil.copytree(whole, tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoint-4")
    resumed = run(tmp_path / "resumed", resume_from_checkpoint="latest", no_fused_optimizer=True)
    for key, value in weights(whole, 4).items():
        torch.testing.assert_close(weights(resumed, 4)[key], value, rtol=0, atol=1e-6)


def test_gradients_are_views_of_one_buffer() -> None:
    layer = torch.nn.Linear(3, 2)
    gradients = Gradients(layer.parameters())
    layer(torch.ones(1, 3)).sum().backward()
    expected = torch.cat([torch.ones(6), torch.ones(2)])
    assert torch.equal(gradients.flat, expected)
    norm = gradients.clip(1.0)
    assert float(norm) == pytest.approx(8**0.5)
    assert layer.weight.grad is not None and float(
        layer.weight.grad.norm() ** 2 + layer.bias.grad.norm() ** 2
    ) == pytest.approx(1, 1e-4)
    gradients.zero()
    assert not layer.weight.grad.any()


def test_the_norm_of_many_gradients_is_right_to_a_hundred_thousandth() -> None:
    gradients = Gradients([torch.nn.Parameter(torch.empty(20_000_001))])  # one float32 sum of these is 0.1 % too small
    gradients.flat.normal_(1e-3, 1e-3, generator=torch.Generator().manual_seed(0))
    exact = sum(float(part.double().square().sum()) for part in gradients.flat.split(2**20)) ** 0.5
    assert float(gradients.clip(None)) == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("is_loss", [True, False], ids=["loss", "gradient"])
def test_a_loss_or_gradient_that_is_not_finite_shows_in_the_report(is_loss: bool) -> None:
    layer = torch.nn.Linear(3, 2)
    gradients = Gradients(layer.parameters())
    assert gradients.report(gradients.clip(1.0)).tolist() == [0, 0, 0]
    gradients.add_loss(torch.tensor(float("inf"))) if is_loss else gradients.flat[1].fill_(float("nan"))
    gradients.average(world=1)
    assert gradients.report(gradients.clip(1.0))[2] == 1


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "fp16_scaler"])
def test_not_finite_gradients_stop_the_run_with_its_own_code(
    run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], scaled: bool
) -> None:
    from ip_adapter_trainer.core.errors import NotFiniteProblem
    from ip_adapter_trainer.train.step import Step

    honest, scaler = Step.__call__, torch.amp.GradScaler

    def forced(device: str, init_scale: float, enabled: bool) -> torch.amp.GradScaler:
        return scaler(device, init_scale=init_scale, enabled=scaled)

    monkeypatch.setattr(torch.amp, "GradScaler", forced)
    monkeypatch.setattr(Step, "__call__", lambda self, batch: honest(self, batch) * float("nan"))
    with pytest.raises(NotFiniteProblem) as caught:
        run(tmp_path / "out", max_train_steps=9, save_steps=100)
    assert caught.value.exit_code == 5
    skipped = [line for line in capsys.readouterr().err.splitlines() if "step skipped" in line]
    assert len(skipped) == 5 and all(line.count("data.json, element ") == 2 for line in skipped)
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line, parse_constant=pytest.fail)["loss"] for line in lines]
    assert losses == [None] * 5, "what is not finite is null, and every line is JSON"


def test_an_error_in_the_middle_loses_no_steps(run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ip_adapter_trainer.train.step import Step

    honest, calls = Step.__call__, []

    def fail_at_the_fourth(self: Step, batch: object) -> torch.Tensor:
        calls.append(batch)
        if len(calls) == 4:
            raise RuntimeError("out of memory")
        return honest(self, batch)  # type: ignore[arg-type]

    monkeypatch.setattr(Step, "__call__", fail_at_the_fourth)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(tmp_path / "out", max_train_steps=9, save_steps=100)
    assert [p.name for p in all_checkpoints(tmp_path / "out")] == ["checkpoint-3"]


def test_the_grid_reaches_its_file_and_tensorboard(run: Callable, tmp_path: Path) -> None:
    from PIL import Image

    output = run(tmp_path / "out", max_train_steps=2, grid_rows=2, grid_steps=2, report_to="tensorboard")
    image = Image.open(output / "grids" / "step-0000002.png")
    assert image.width > 4 * 160 > image.height > 2 * 160 - 1 or image.height > 320
    assert list((output / "logs").rglob("events.out.tfevents.*"))


def test_a_vae_whose_noise_drowns_its_latents_is_told(
    run: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As that of the tiny bases, which nobody trained."""
    run(tmp_path / "sample", max_train_steps=1)
    assert "of the variance of the VAE's latents is its own noise: give --latents mean" in capsys.readouterr().err
    run(tmp_path / "mean", max_train_steps=1, latents="mean")
    assert "its own noise" not in capsys.readouterr().err


def test_the_share_of_noise_is_that_of_the_variances() -> None:
    mean = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    for log_variance, share in ((-30.0, 0.0), (0.0, 0.5), (10.0, 1.0)):
        moments = torch.cat([mean, torch.full_like(mean, log_variance)], 1)
        assert noise_share([moments[:1], moments[1:]]) == pytest.approx(share, abs=0.03)
