"""Between two batches the host never waits for the device.

There need be no GPU to see it: on the meta device numbers do not exist, so a step that asked for one would fail, and
every copy between devices passes through a dispatcher that can be watched.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ip_adapter_trainer.core.values import Batch, Encoded, Geometry, Pixels
from ip_adapter_trainer.diffusion import NoiseProcess, ObjectiveConfig
from ip_adapter_trainer.train.config import LeanConfig
from ip_adapter_trainer.train.lean import lean
from ip_adapter_trainer.train.optim import Gradients
from ip_adapter_trainer.train.step import Step
from tests import tiny
from tests.test_model import build

META = torch.device("meta")


class Waits(TorchDispatchMode):
    """Notes each copy between host and device that holds up the host."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default:
            target = torch.device(kwargs.get("device") or args[0].device)
            self._note(func, args[0].device, target, kwargs.get("non_blocking", False))
        if func is torch.ops.aten.copy_.default:
            self._note(func, args[1].device, args[0].device, args[2] if len(args) > 2 else False)
        return func(*args, **kwargs)

    def _note(self, func: Any, source: torch.device, target: torch.device, non_blocking: bool) -> None:
        if source.type != target.type and not non_blocking:
            self.found.append(f"{func} from {source} to {target}")


def batch_of(model: Any, encoded: str) -> Batch:
    prompts = {"image": torch.zeros(2, 3, *[model.encoder.side_px] * 2)}
    inputs: Pixels | Encoded = Pixels(torch.zeros(2, 3, 32, 32), prompts)
    if encoded != "pixels":
        features = {need: torch.zeros(2, *model.encoder.features[need.feature]) for need in model.variant.needs}
        channels, height, width = model.codec.latent_shape(32, 32)
        captions = model.codec.text(["a dog", ""]) if encoded == "prepared_text" else {}
        text = {name: torch.zeros(tensor.shape, dtype=tensor.dtype) for name, tensor in captions.items()}
        inputs = Encoded(torch.zeros(2, 2 * channels, height, width), features, text)
    places, drops = torch.arange(2), torch.tensor([True, False])
    geometry = (Geometry((32, 32), (0, 0), (32, 32)),) * 2
    return Batch(places, places, inputs, ("a dog", ""), geometry, drops, drops)


@pytest.mark.parametrize("encoded", ["pixels", "prepared", "prepared_text"])
@pytest.mark.parametrize("variant", ["base", "plus"])
@pytest.mark.parametrize("base", tiny.UNETS)
def test_a_step_reads_nothing_from_the_device(
    base: tiny.Base, variant: str, encoded: str, base_folder: Callable, encoder_folder: Path
) -> None:
    model = build(base_folder(base), encoder_folder, variant)
    model.denoiser.pipeline.to(META)
    model.encoder.model.to(META)
    model.adapter.to(META)
    step = Step(model, NoiseProcess(model.denoiser.pipeline.scheduler, ObjectiveConfig(snr_gamma=5.0)), 0, META)
    gradients = Gradients([p for p in model.adapter.parameters() if p.requires_grad])
    batch = batch_of(model, encoded)
    with model.attached(), lean(model, LeanConfig()):
        step(batch)  # what is kept from the first step on may be fetched in it
        with Waits() as waits:
            gradients.zero()
            loss = step(batch)
            loss.backward()
            gradients.add_loss(loss.detach())
            gradients.average(world=1)
            report = gradients.report(gradients.clip(1.0))
    assert report.shape == (3,) and report.device == META
    assert waits.found == []


def test_a_wait_would_be_seen() -> None:
    with Waits() as waits:
        torch.zeros(2).to(META)
    assert len(waits.found) == 1
    with pytest.raises(RuntimeError, match="meta"):
        bool(torch.zeros(1, device=META).sum() > 0)
