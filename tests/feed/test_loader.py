"""The loader: the order's batches, whatever the workers; lost workers are replaced and nothing is lost or doubled."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from ip_adapter_trainer.core.errors import DataProblem
from ip_adapter_trainer.core.values import Batch
from ip_adapter_trainer.feed.loader import Loader
from ip_adapter_trainer.feed.readers import Preprocess
from ip_adapter_trainer.feed.sampler import Sampler
from ip_adapter_trainer.manifest.faults import FaultLog
from ip_adapter_trainer.runtime.workers import MAX_REPLACEMENTS
from tests.manifest.rows import NO_DROPS, number_of, preprocess, training_set, write_manifest, write_pictures

ROWS = 12


def _loader(
    folder: Path, *, preparation: Preprocess = preprocess, world: int = 1, rank: int = 0, batch_images: int = 4,
    pin: bool = False, **settings: Any,
) -> Loader:  # fmt: skip
    if not (folder / "data.json").exists():
        write_manifest(folder, write_pictures(folder, ROWS))
    settings = NO_DROPS | {"train_batch_size": 2} | settings
    samples = training_set(folder / "data.json", preprocess=preparation, **settings)
    sampler = Sampler(samples.bucketing.bucket_of_row, seed=3, batch_images=batch_images)
    log, images = FaultLog(folder / "run", ROWS, 0.5), samples.config.micro_images
    return Loader(samples, sampler, log, images, rank=rank, world=world, pin=pin)


def _take(loader: Loader, micros: int, step: int = 0) -> list[Batch]:
    batches = loader.from_step(step)
    taken = list(islice(batches, micros))
    batches.close()  # type: ignore[attr-defined]
    return taken


def _pairs(batches: list[Batch]) -> list[tuple[int, int]]:
    return [pair for b in batches for pair in zip(b.index.tolist(), b.row.tolist(), strict=True)]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_the_order(tmp_path: Path, workers: int) -> None:
    loader = _loader(tmp_path, dataloader_num_workers=workers)
    batches = _take(loader, 2 * loader.micro_per_step, step=5)
    sampler = Sampler([0] * ROWS, seed=3, batch_images=4)
    assert loader.micro_per_step == 2 and [len(b) for b in batches] == [2] * 4
    assert _pairs(batches) == sampler.step(5) + sampler.step(6)
    assert all(number_of(b.inputs.pixels[i]) == b.row[i] for b in batches for i in range(2))


def test_workers_change_nothing(tmp_path: Path) -> None:
    chance = {"random_flip": True, "center_crop": False, "text_drop_rate": 0.3, "prompt_crop_min_share": 0.5}
    alone, helped = (_take(_loader(tmp_path, dataloader_num_workers=n, **chance), 6) for n in (0, 2))
    for one, other in zip(alone, helped, strict=True):
        assert torch.equal(one.inputs.pixels, other.inputs.pixels) and torch.equal(
            one.inputs.prompts["image"], other.inputs.prompts["image"]
        )
        assert (one.text, one.geometry) == (other.text, other.geometry)


def test_processes_share_a_step(tmp_path: Path) -> None:
    whole = _pairs(_take(_loader(tmp_path, batch_images=8), 4))
    parts = [_pairs(_take(_loader(tmp_path, batch_images=8, world=2, rank=rank), 2)) for rank in (0, 1)]
    assert sorted(whole) == sorted(parts[0] + parts[1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU to pin memory for")
def test_batches_of_workers_are_pinned(tmp_path: Path) -> None:
    (batch,) = _take(_loader(tmp_path, pin=True, dataloader_num_workers=2), 1)
    assert batch.inputs.pixels.is_pinned() and batch.inputs.prompts["image"].is_pinned()


@pytest.mark.parametrize("workers", [0, 2])
def test_faults_are_noted_and_stop_the_run(tmp_path: Path, workers: int) -> None:
    loader = _loader(tmp_path, dataloader_num_workers=workers)
    for number in range(8):
        (tmp_path / f"{number}.png").write_bytes(b"")
    with pytest.raises(DataProblem, match=r"over the limit of 50\.00%"):
        _take(loader, 2 * ROWS)
    assert len((tmp_path / "run" / "faults.jsonl").read_text().splitlines()) >= 7


@pytest.mark.parametrize("workers", [0, 2])
def test_a_problem_in_a_worker_comes_as_it_is(tmp_path: Path, workers: int) -> None:
    loader = _loader(tmp_path, dataloader_num_workers=workers)
    for number in range(ROWS):
        (tmp_path / f"{number}.png").unlink()
    with pytest.raises(DataProblem, match=f"{ROWS} rows in turn cannot be read") as caught:
        _take(loader, 1)
    assert "Traceback" not in str(caught.value)


class _Trouble:
    """Preprocessing that once, at one picture in a worker, ends or holds up its process."""

    def __init__(self, folder: Path, number: int, *, hang: bool = False, always: bool = False) -> None:
        self.mark, self.number, self.hang, self.always = folder / "trouble", number, hang, always
        self.parent = os.getpid()

    def __call__(self, image: Image.Image) -> Tensor:
        blue = image.getpixel((0, 0))[2]  # type: ignore[index]
        if blue == self.number and os.getpid() != self.parent and (self.always or not self.mark.exists()):
            self.mark.touch()
            time.sleep(600) if self.hang else os._exit(9)
        return preprocess(image)


@pytest.mark.parametrize("hang", [False, True])
def test_lost_workers_are_replaced_at_the_exact_place(tmp_path: Path, hang: bool) -> None:
    calm = _pairs(_take(_loader(tmp_path), 9))
    trouble = _Trouble(tmp_path, calm[9][1], hang=hang)
    loader = _loader(tmp_path, preparation=trouble, dataloader_num_workers=2, data_timeout_s=2)
    assert _pairs(_take(loader, 9)) == calm and trouble.mark.exists()


def test_workers_lost_again_and_again_are_a_problem(tmp_path: Path) -> None:
    trouble = _Trouble(tmp_path, 5, always=True)
    loader = _loader(tmp_path, preparation=trouble, dataloader_num_workers=1, data_timeout_s=2)
    with pytest.raises(DataProblem, match=f"lost {MAX_REPLACEMENTS + 1} times") as caught:
        _take(loader, ROWS)
    assert "(5.png)" in caught.value.fault.where


class _Stop:
    """Preprocessing that stops its process at one picture, as nothing in the process can undo."""

    def __init__(self, folder: Path, number: int) -> None:
        self.mark, self.number, self.parent = folder / "stopped", number, os.getpid()

    def __call__(self, image: Image.Image) -> Tensor:
        blue = image.getpixel((0, 0))[2]  # type: ignore[index]
        if blue == self.number and os.getpid() != self.parent and not self.mark.exists():
            self.mark.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGSTOP)
        return preprocess(image)

    def wait(self) -> None:
        """Until a process has been stopped for good."""
        end = time.monotonic() + 30
        while not self.mark.exists() or not self.mark.read_text():
            assert time.monotonic() < end
            time.sleep(0.01)
        time.sleep(0.1)

    def end(self) -> None:
        """Ends the stopped process, which whoever waits for it could not."""
        with suppress(ProcessLookupError):
            os.kill(int(self.mark.read_text()), signal.SIGKILL)


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="no such signal")
def test_a_worker_that_is_stopped_with_a_batch_in_its_hands_is_replaced(tmp_path: Path) -> None:
    calm = _pairs(_take(_loader(tmp_path), 6))
    stop = _Stop(tmp_path, calm[4][1])  # of the third batch: the second lies in the queue, its tensors in the worker
    loader = _loader(tmp_path, preparation=stop, dataloader_num_workers=1, data_timeout_s=2)
    batches = loader.from_step(0)
    rescue = threading.Timer(20, stop.end)
    rescue.start()
    began = time.monotonic()
    taken = [next(batches)]
    stop.wait()
    taken += islice(batches, 5)
    rescue.cancel()
    assert _pairs(taken) == calm and time.monotonic() - began < 15


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="no such signal")
def test_no_worker_outlives_its_loader(tmp_path: Path) -> None:
    calm = _pairs(_take(_loader(tmp_path), 6))
    stop = _Stop(tmp_path, calm[8][1])  # of a batch that is asked for once the first was handed over
    batches = _loader(tmp_path, preparation=stop, dataloader_num_workers=2).from_step(0)
    next(batches)
    stop.wait()
    batches.close()  # type: ignore[attr-defined]
    end = time.monotonic() + 10
    while multiprocessing.active_children() and time.monotonic() < end:
        time.sleep(0.01)
    alive = multiprocessing.active_children()
    stop.end()
    assert not alive


def _bug(image: Image.Image) -> Tensor:
    raise RuntimeError("a bug")


@pytest.mark.parametrize("workers", [0, 1])
def test_bugs_are_not_taken_for_lost_workers(tmp_path: Path, workers: int) -> None:
    with pytest.raises(RuntimeError, match="a bug"):
        _take(_loader(tmp_path, preparation=_bug, dataloader_num_workers=workers), 1)
