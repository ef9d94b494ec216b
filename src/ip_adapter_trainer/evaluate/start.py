"""From settings to a loaded model and a way of drawing: what `generate` and `evaluate` begin with."""

from __future__ import annotations

import torch

from ip_adapter_trainer.core.errors import Problem
from ip_adapter_trainer.evaluate.config import DrawConfig
from ip_adapter_trainer.evaluate.sample import Sampling, native_size_px
from ip_adapter_trainer.loading.adapter import load_model
from ip_adapter_trainer.model import Model
from ip_adapter_trainer.runtime.precision import dtype_of, on_device


def choose_device(name: str) -> torch.device:
    """Return the device of a name; auto: CUDA, else MPS, else the CPU.

    Raises:
        Problem: no such device on this machine.
    """
    if name == "auto":
        mps = torch.backends.mps.is_available()
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        what = f"this machine cannot use the device {name!r}"
        raise Problem(what, where="--device", remedy="take auto or cpu") from error
    return device


def choose_dtype(mixed_precision: str | None, device: torch.device) -> torch.dtype:
    """Return the dtype of the frozen weights; fp16 becomes bf16 on a CPU, which cannot run it, and a line says so."""
    default = "fp16" if device.type == "cuda" else "no"
    return dtype_of(on_device(mixed_precision or default, device.type))


def load(config: DrawConfig) -> Model:
    """Load the adapter on its frozen models.

    Raises:
        Problem: something is missing or does not fit.
    """
    device = choose_device(config.device)
    dtype = choose_dtype(config.mixed_precision, device)
    base, encoder = config.pretrained_model_name_or_path, config.image_encoder_path
    return load_model(config.adapter, base, encoder, dtype, device, config)


def sampling(config: DrawConfig, model: Model) -> Sampling:
    """Return how the settings want images drawn."""
    height_px, width_px = native_size_px(model)
    return Sampling(
        height_px=config.height or height_px,
        width_px=config.width or width_px,
        steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        scale=config.scale,
        scheduler=config.scheduler,
        negative_prompt=config.negative_prompt,
        batch_images=config.batch_size,
    )
