"""Noise processes that are known are the schedulers' own; others are refused, by class and by setting."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from ip_adapter_trainer.adapter_files import write_adapter
from ip_adapter_trainer.card import card_of
from ip_adapter_trainer.cli import RUN, guarded
from ip_adapter_trainer.core.errors import Problem
from ip_adapter_trainer.diffusion import NoiseProcess, ObjectiveConfig
from ip_adapter_trainer.diffusion.schedulers import KNOWN, make_scheduler
from tests import tiny
from tests.test_model import build

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
OPTIONAL = {"DPMSolverSDEScheduler": "torchsde", "LMSDiscreteScheduler": "scipy"}  # need libraries that few have


def process(kind: str, config: dict[str, Any], **overrides: Any) -> NoiseProcess:
    return NoiseProcess(make_scheduler(kind, config, overrides, "base"), ObjectiveConfig())


@pytest.mark.parametrize("kind", sorted(KNOWN - OPTIONAL.keys()))
@pytest.mark.parametrize(
    "config", [{}, SD, {"beta_schedule": "squaredcos_cap_v2"}, {"trained_betas": [0.1, 0.2, 0.3]}], ids=str
)
def test_alphas_are_the_classes_own(kind: str, config: dict[str, Any]) -> None:
    """With settings that are not given, too: classes have other defaults than DDPM's."""
    try:
        own = getattr(diffusers, kind).from_config(config)
    except NotImplementedError:
        with pytest.raises(Problem, match="settings that are not known"):
            process(kind, config)
        return
    found = process(kind, config)
    assert torch.equal(found.scheduler.alphas_cumprod, own.alphas_cumprod)
    assert found.num_timesteps == len(own.alphas_cumprod)


@pytest.mark.parametrize("kind", sorted(OPTIONAL))
def test_a_class_whose_library_is_missing_is_told(kind: str) -> None:
    try:
        __import__(OPTIONAL[kind])
    except ImportError:
        with pytest.raises(Problem, match=f"{kind} needs another library"):
            process(kind, SD)
    else:
        process(kind, SD)


def test_every_scheduler_of_diffusers_is_known_or_refused() -> None:
    for kind in (name for name in dir(diffusers) if name.endswith("Scheduler")):
        if kind not in KNOWN:
            with pytest.raises(Problem, match=f"scheduler is {kind}"):
                process(kind, {})


@pytest.mark.parametrize(
    ("kind", "config", "told"),
    [
        ("EDMDPMSolverMultistepScheduler", {"sigma_data": 0.5}, r"EDMDPMSolverMultistepScheduler \(EDM\)"),
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, r"\(flow matching\)"),
        ("SomebodysScheduler", SD, "SomebodysScheduler, which is not trained here"),
        ("None", SD, "scheduler is None"),
        ("EulerDiscreteScheduler", {"_class_name": "EDMEulerScheduler"}, "EDMEulerScheduler"),
        ("EulerDiscreteScheduler", {"timestep_type": "continuous", "prediction_type": "v_prediction"}, "continuous"),
        ("UniPCMultistepScheduler", {"use_flow_sigmas": True}, "use_flow_sigmas True"),
        ("UniPCMultistepScheduler", {"prediction_type": "flow_prediction"}, "flow_prediction"),
        ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "epsilon"}, "use_flow"),
        ("DPMSolverMultistepScheduler", {"prediction_type": "flow_prediction"}, r"flow_prediction \(flow matching\)"),
        ("DEISMultistepScheduler", {"use_flow_sigmas": True, "flow_shift": 3.0}, "use_flow_sigmas True"),
        ("DDIMScheduler", SD | {"snr_shift_scale": 3.0}, "snr_shift_scale 3.0"),
        ("DDIMScheduler", {"beta_schedule": "cosine"}, "settings that are not known"),
        ("DDIMScheduler", {"prediction_type": "epsilom"}, "unknown prediction type 'epsilom'"),
        ("DDIMScheduler", {"trained_betas": [0.1, 1.5]}, "settings that are not known"),
        ("DDIMScheduler", {"trained_betas": []}, "settings that are not known"),
        ("DDIMScheduler", SD | {"rescale_betas_zero_snr": "no"}, "rescale_betas_zero_snr 'no'"),
        ("EulerDiscreteScheduler", {"_class_name": ["x", "EDMEulerScheduler"]}, "scheduler is x"),
        ("DDIMScheduler", {"trained_betas": "x"}, "settings that are not known"),
        ("DDIMScheduler", SD | {"rescale_betas_zero_snr": True}, "noise alone"),
    ],
)
def test_other_noise_is_refused(kind: str, config: dict[str, Any], told: str) -> None:
    with pytest.raises(Problem, match=told) as refused:
        process(kind, config)
    assert refused.value.fault.remedy


def test_settings_that_leave_the_noise_alone_are_taken() -> None:
    """As diffusers writes them: every setting of the class, and those that its kin have."""
    for kind in ("UniPCMultistepScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler"):
        config = dict(getattr(diffusers, kind)(**SD, use_karras_sigmas=True).config) | {"skip_prk_steps": True}
        expected = DDPMScheduler(**SD).alphas_cumprod
        assert torch.equal(process(kind, config).scheduler.alphas_cumprod, expected)


def test_zero_terminal_snr_is_rescaled_as_the_paper_does() -> None:
    v = SD | {"prediction_type": "v_prediction"}
    expected = DDIMScheduler(**v, rescale_betas_zero_snr=True).alphas_cumprod
    assert expected[-1] == 0
    for kind in ("DDIMScheduler", "EulerDiscreteScheduler", "PNDMScheduler"):
        said, asked = process(kind, v | {"rescale_betas_zero_snr": True}), process(kind, v, rescale_betas_zero_snr=True)
        for found in (said, asked):
            assert torch.equal(found.scheduler.alphas_cumprod, expected)
    last, noise, x = torch.tensor([999]), torch.ones(1, 4, 2, 2), torch.full((1, 4, 2, 2), 0.5)
    assert torch.equal(asked.add_noise(x, noise, last), noise) and torch.equal(asked.target(x, noise, last), -x)
    scheduler = make_scheduler("DDIMScheduler", v, {"rescale_betas_zero_snr": True}, "base")
    assert scheduler.config.timestep_spacing == "trailing", "sampling begins at the last timestep"


@pytest.fixture
def adapter_file(base_folder: Callable, encoder_folder: Path, tmp_path: Path) -> Path:
    """An adapter that nothing was trained of."""
    model = build(base_folder("sd1"), encoder_folder, "base")
    card = card_of(model, base=str(base_folder("sd1")), step=0, images_seen=0, loaded_with={})
    write_adapter(tmp_path / "adapter.safetensors", model.adapter.published(), card.to_metadata(), model.layout)
    return tmp_path / "adapter.safetensors"


@pytest.mark.parametrize("command", ["train", "prepare", "generate", "evaluate"])
def test_every_command_refuses_a_noise_that_it_does_not_know(
    command: str, base_folder: Callable, encoder_folder: Path, rows_folder: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], adapter_file: Path,
) -> None:  # fmt: skip
    base = Path(shutil.copytree(base_folder("sd1"), tmp_path / "edm"))
    edm = {"_class_name": "EDMDPMSolverMultistepScheduler", "sigma_data": 0.5, "prediction_type": "epsilon"}
    (base / "scheduler/scheduler_config.json").write_text(json.dumps(edm))
    rows = ["--data_json_file", str(rows_folder / "data.json"), "--data_root_path", str(rows_folder / "images")]
    models = ["--pretrained_model_name_or_path", str(base), "--image_encoder_path", str(encoder_folder)]
    image = str(rows_folder / "images/00000.png")
    own = {
        "train": [*rows, "--output_dir", str(tmp_path / "out")],
        "prepare": [*rows, "--prepared_dir", str(tmp_path / "prepared")],
        "generate": ["--adapter", str(adapter_file), "--image", image, "-o", str(tmp_path / "a.png")],
        "evaluate": ["--adapter", str(adapter_file), *rows, "--num_rows", "2", "--output", str(tmp_path / "e.json")],
    }
    if command == "evaluate":
        own[command] += ["--clip_model", str(tiny.make_scorer(tmp_path / "clip"))]
    assert guarded(RUN[command], [*models, *own[command]]) == 2
    assert "EDMDPMSolverMultistepScheduler (EDM)" in capsys.readouterr().err
