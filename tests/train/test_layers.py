"""Adapters on some layers only: the others compute nothing, and the file still holds every layer."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ip_adapter_trainer.core.errors import Problem
from ip_adapter_trainer.export import ExportConfig, export
from ip_adapter_trainer.loading.adapter import load_model
from ip_adapter_trainer.train import checkpoint
from tests.train.test_resume import assert_same_run


def pairs(output: Path, step: int = 4) -> dict[str, Tensor]:
    state = torch.load(output / f"checkpoint-{step}" / checkpoint.WEIGHTS, weights_only=True)
    return {name: tensor for name, tensor in state.items() if name.startswith("adapter_modules.")}


def adapted(output: Path) -> set[str]:
    """Names of the layers whose pairs are not zero."""
    layers = {layer.number: layer.name for layer in load_model(output).layers}
    return {layers[int(name.split(".")[1])] for name, tensor in pairs(output).items() if bool(tensor.any())}


@pytest.mark.parametrize(
    ("base", "names", "beginning"),
    [
        ("sd1", ("up",), "up_blocks."),
        ("sdxl", ("style",), "up_blocks.0.attentions.1."),
        ("sd2v", ("mid_block",), "mid_"),
    ],
)
def test_only_the_named_layers_are_trained(
    run: Callable, tmp_path: Path, base: str, names: tuple[str, ...], beginning: str
) -> None:
    output = run(tmp_path / "out", base=base, adapter_layers=" ".join(names))
    found, every = adapted(output), [layer.name for layer in load_model(output).layers]
    assert found == {name for name in every if name.startswith(beginning)} and found != set(every)
    exported = export(ExportConfig(source=str(output), output=str(tmp_path / "adapter.safetensors"), dtype="fp32"))
    assert exported.difference <= 1e-5, "diffusers computes the same with the zeros as the run without those layers"


def test_the_optimizer_knows_only_what_is_trained(run: Callable, tmp_path: Path) -> None:
    output = run(tmp_path / "out", adapter_layers="mid_block", max_train_steps=1, optimizer="adamw")
    moments = checkpoint.read(output / "checkpoint-1").state["optimizer"]
    model = load_model(output)
    trained = [*model.adapter.image_proj_model.parameters()]
    for layer in model.layers:
        if layer.name.startswith("mid_block"):
            trained += model.adapter.adapter_modules[str(layer.number)].parameters()
    assert [tuple(m["exp_avg"].shape) for m in moments.values()] == [tuple(p.shape) for p in trained]


def test_a_resumed_run_keeps_its_layers_and_its_bytes(run: Callable, tmp_path: Path) -> None:
    extra = {"adapter_layers": "up", "use_ema": True}
    whole, broken = run(tmp_path / "whole", **extra), tmp_path / "broken"
    shutil.copytree(whole, broken)
    shutil.rmtree(broken / "checkpoint-4")
    with pytest.raises(Problem, match="adapter_layers was"):
        run(broken, use_ema=True, resume_from_checkpoint="latest")
    run(broken, resume_from_checkpoint="latest", **extra)
    assert_same_run(whole, broken, 4)


def test_a_run_from_another_adapter_silences_the_layers_it_does_not_name(run: Callable, tmp_path: Path) -> None:
    first = run(tmp_path / "first")
    assert len(adapted(first)) > 1
    second = run(tmp_path / "second", adapter_layers="mid_block", pretrained_ip_adapter_path=first)
    assert {name.split(".")[0] for name in adapted(second)} == {"mid_block"}


def test_names_that_stand_for_nothing_are_refused(run: Callable, tmp_path: Path) -> None:
    with pytest.raises(Problem, match="'style' is no layer") as caught:
        run(tmp_path / "out", adapter_layers="style")
    assert "--adapter_layers" in str(caught.value)
    with pytest.raises(Problem, match="did you mean 'mid_block"):
        run(tmp_path / "out", adapter_layers="mid_blok")
