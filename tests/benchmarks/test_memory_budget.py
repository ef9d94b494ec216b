"""The counter of live bytes counts what lives, and a budget is that of the real nets."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("bitsandbytes")
from benchmarks.memory_budget import LiveBytes, budget, bytes_of
from benchmarks.sizes import SIZES, build
from ip_adapter_trainer.families import FAMILIES
from ip_adapter_trainer.nn.packed import Storage, pack


def test_bytes_count_while_they_live_and_views_and_inputs_do_not() -> None:
    x = torch.randn(100)
    with LiveBytes() as live:
        first = x + 1
        second = first[10:] * 2  # 90 new ones; the view is none
        del first
        second.add_(1)
        third = second.exp()
    assert live.peak == 4 * (100 + 90) and live.now == 4 * (90 + 90)
    del second, third
    assert live.now == 0


@pytest.mark.parametrize("storage", ["none", "int8", "nf4"])
def test_a_budget_is_that_of_real_weights(storage: Storage) -> None:
    unet = build(SIZES["tiny"], "cpu").pipeline.unet.to(torch.bfloat16)
    pack(unet, storage, "cpu", FAMILIES["sd"].spared)
    assert budget(SIZES["tiny"], 32, storage, recompute=False).denoiser == bytes_of(unet)


def test_recomputing_activations_needs_less_and_more_images_need_more() -> None:
    kept, recomputed = (budget(SIZES["tiny"], 128, "none", recompute=on).step for on in (False, True))
    assert recomputed < 0.8 * kept
    assert 1.8 * kept < budget(SIZES["tiny"], 128, "none", recompute=False, images=2).step < 2.2 * kept
