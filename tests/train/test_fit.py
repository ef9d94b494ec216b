"""Images taken at once, by the memory there is."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ip_adapter_trainer.cli import guarded
from ip_adapter_trainer.config import parse_train
from ip_adapter_trainer.core.values import Batch
from ip_adapter_trainer.runtime import memory
from ip_adapter_trainer.train import checkpoint, fit
from ip_adapter_trainer.train.fit import Fit, fitted

LARGE_EPSILON = {"adam_epsilon": 1.0, "learning_rate": 1.0, "optimizer": "adamw", "max_train_steps": 2}


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes a device have so many bytes."""
    return lambda size: monkeypatch.setattr(fit, "free_bytes", lambda device, sharing: size)


def kept(told: str) -> str:
    """The line that tells how images are taken."""
    return next(line for line in told.splitlines() if "at a time" in line)


def weights(output: Path) -> dict[str, torch.Tensor]:
    return torch.load(output / "checkpoint-2" / checkpoint.WEIGHTS, weights_only=True)


def test_little_memory_splits_a_step_and_changes_no_result(
    run: Callable, tmp_path: Path, room: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    def trained(size: int) -> tuple[Path, dict, str]:
        room(size)
        output = run(tmp_path / str(size), train_batch_size=None, **LARGE_EPSILON)
        state = json.loads((output / "checkpoint-2" / checkpoint.STATE).read_text())["state"]
        assert state["images_per_step"] == 8
        return output, state["fit"], kept(capsys.readouterr().err)

    whole, fit, told = trained(10**12)
    assert fit == {"images": 8, "recomputed": False}
    image = 1e9 * float(re.search("one keeps (.*?) GB", told)[1])  # type: ignore[index]
    for_three = 12 * sum(w.numel() for w in weights(whole).values()) + 3 * 1.25 * image
    for room_bytes, way in (for_three, {"images": 2, "recomputed": False}), (0, {"images": 1, "recomputed": True}):
        output, fit, told = trained(int(room_bytes))
        assert fit == way and told.startswith(f"{way['images']} of 8 images at a time")
        for key, value in weights(whole).items():
            torch.testing.assert_close(weights(output)[key], value, rtol=1e-4, atol=1e-6)


def test_a_resumed_run_takes_as_many_at_once_as_before(
    run: Callable, tmp_path: Path, room: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    room(0)
    run(tmp_path / "out", train_batch_size=None, max_train_steps=2)
    room(10**12)
    capsys.readouterr()
    run(tmp_path / "out", train_batch_size=None, max_train_steps=3, resume_from_checkpoint="latest")
    state = json.loads((tmp_path / "out" / "checkpoint-3" / checkpoint.STATE).read_text())["state"]
    assert state["fit"] == {"images": 1, "recomputed": True} and "at a time" not in capsys.readouterr().err


def test_on_a_gpu_a_step_is_tried_until_it_goes_through(
    monkeypatch: pytest.MonkeyPatch, room: Callable, flags: Callable, tmp_path: Path
) -> None:
    tried: list[int] = []
    adapter = torch.nn.Linear(2, 1)

    def step(batch: Batch) -> torch.Tensor:
        tried.append(len(batch))
        if len(batch) > 2:
            raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB")
        return adapter(torch.ones(2)).sum()

    recomputing: list[int] = []
    model = SimpleNamespace(
        adapter=adapter, denoiser=SimpleNamespace(net=torch.nn.Identity()), attached=nullcontext,
        checkpoint_activations=lambda: recomputing.append(len(tried)),
    )  # fmt: skip
    monkeypatch.setattr(fit, "lean", lambda *_: nullcontext())
    monkeypatch.setattr(fit, "joined", lambda rows: rows)
    room(10**12)
    taken: list[int] = []
    data = SimpleNamespace(seen=SimpleNamespace(batches=lambda count: [[0]]), take_at_once=taken.append)
    runtime = SimpleNamespace(device=SimpleNamespace(type="cuda"), highest=lambda number: number, local_world=1)
    own = type("Own", (), {"__call__": lambda self, batch: step(batch), "model": model, "device": "cpu"})()
    config = parse_train(flags(tmp_path, train_batch_size=None))
    found = fitted(config, own, data, runtime, SimpleNamespace(state=None))  # type: ignore[arg-type]
    assert (found, tried, taken) == (Fit(2), [1, 8, 4, 2], [2])
    assert not recomputing and adapter.weight.grad is None


@pytest.mark.parametrize(("limit", "left"), [("1000", 1000 - 400 + 100), ("max", None)])
def test_a_container_leaves_what_its_limit_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, left: int | None
) -> None:
    whole = memory.free_bytes(torch.device("cpu"))
    texts = {"max": limit, "current": "400", "stat": "anon 300\ninactive_file 100\n"}
    for name, text in texts.items():
        (tmp_path / f"memory.{name}").write_text(text)
    monkeypatch.setattr(memory, "_GROUP", tmp_path)
    found = memory.free_bytes(torch.device("cpu"))
    assert found == left if left else found > whole / 2


def test_memory_that_is_not_enough_is_told_with_a_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    def work(argv: object) -> Iterator[int]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    assert guarded(work, []) == 1  # type: ignore[arg-type]
    assert "memory is not enough: CUDA out of memory" in capsys.readouterr().err
