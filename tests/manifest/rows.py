"""Training sets of a few small files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ip_adapter_trainer.core.errors import Fault
from ip_adapter_trainer.core.values import Geometry, map_tensors
from ip_adapter_trainer.feed.bucketing import assign_buckets
from ip_adapter_trainer.feed.config import DataConfig
from ip_adapter_trainer.feed.dataset import TrainingSet
from ip_adapter_trainer.feed.readers import Preprocess
from ip_adapter_trainer.feed.sampler import Pair
from ip_adapter_trainer.manifest.manifest import read_manifest

NO_DROPS: dict[str, Any] = {"text_drop_rate": 0.0, "image_drop_rate": 0.0, "both_drop_rate": 0.0}


def preprocess(image: Image.Image) -> Tensor:
    """The whole picture as [3, 16, 16] in 0..255; stands for an image encoder's own."""
    return torch.from_numpy(np.array(image.resize((16, 16)), dtype=np.float32)).permute(2, 0, 1)


def write_pictures(folder: Path, count: int, *, sizes: tuple[tuple[int, int], ...] = ((32, 48),)) -> list[str]:
    """Pictures whose blue channel tells their number; red grows to the right. Sizes are (height, width), in turn."""
    names = []
    for number in range(count):
        height, width = sizes[number % len(sizes)]
        pixels = np.zeros((height, width, 3), np.uint8)
        pixels[..., 0] = np.linspace(0, 255, width)
        pixels[..., 2] = number
        names.append(f"{number}.png")
        Image.fromarray(pixels).save(folder / names[-1])
    return names


def write_manifest(folder: Path, names: list[str], **more: list[Any]) -> Path:
    """A data.json of pictures with their captions, and further columns."""
    rows = [{"image_file": name, "text": f"picture {name}"} for name in names]
    for column, values in more.items():
        for row, value in zip(rows, values, strict=True):
            row[column] = value
    path = folder / "data.json"
    path.write_text(json.dumps(rows))
    return path


class Sample(NamedTuple):
    """One image of a batch."""

    index: int
    row: int
    inputs: Any
    text: str
    geometry: Geometry
    drop_text: bool
    drop_image: bool
    faults: tuple[Fault, ...]


class Singly(TrainingSet):
    """A training set of which single samples can be asked."""

    def __getitem__(self, pair: Pair) -> Sample:
        """The one sample of the batch of one (index, row) pair."""
        b = self.batch([pair])
        alone = map_tensors(lambda stack: stack[0], b.inputs)
        flags = bool(b.drop_text), bool(b.drop_image)
        return Sample(int(b.index), int(b.row), alone, b.text[0], b.geometry[0], *flags, b.faults)


def training_set(manifest: Path, *, seed: int = 0, preprocess: Preprocess = preprocess, **settings: Any) -> Singly:
    """The samples of a manifest, 32 px unless told."""
    config = DataConfig(data_json_file=str(manifest), **{"resolution": 32, "bucket_step_px": 8, **settings})
    rows = read_manifest(config)
    return Singly(rows, config, assign_buckets(rows, config), seed=seed, preprocess={"image": preprocess})


def number_of(pixels: Tensor) -> int:
    """The number of the picture that [3, H, W] in -1..1 was cut from."""
    return round(float((pixels[2].mean() + 1) * 127.5))
