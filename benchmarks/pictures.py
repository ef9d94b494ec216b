"""Picture files for both sides, and batches of them as the published step reads them."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from ip_adapter_trainer.core.values import Batch
from ip_adapter_trainer.encoders.clip import ClipEncoder
from ip_adapter_trainer.feed.bucketing import assign_buckets
from ip_adapter_trainer.feed.config import DataConfig
from ip_adapter_trainer.feed.dataset import TrainingSet
from ip_adapter_trainer.feed.loader import Loader
from ip_adapter_trainer.feed.readers import Preprocess
from ip_adapter_trainer.feed.sampler import Sampler
from ip_adapter_trainer.manifest.faults import FaultLog
from ip_adapter_trainer.manifest.manifest import read_manifest

_AGE_S = 3600.0  # of a file that was changed just now the content is looked at at every use


@dataclass(frozen=True)
class Files:
    """Pictures on the disk, and how both sides read them."""

    manifest: Path
    count: int
    side_px: int  # what they are cut to
    workers: int = 0

    @property
    def settings(self) -> dict[str, Any]:
        """As settings of the package."""
        return {
            "data_json_file": str(self.manifest), "resolution": self.side_px, "dataloader_num_workers": self.workers,
        }  # fmt: skip


def write_pictures(folder: Path, side_px: int, count: int) -> Path:
    """JPEGs of smooth noise, 4 to 3 and half as high again as they are cut to, an hour old; returns their manifest."""
    rng = np.random.default_rng(0)
    rows, old = [], time.time() - _AGE_S
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8))
        file = folder / f"{number}.jpg"
        coarse.resize((2 * side_px, 3 * side_px // 2), Image.Resampling.BICUBIC).save(file, quality=92)
        os.utime(file, (old, old))
        rows.append({"image_file": file.name, "text": "a picture"})
    manifest = folder / "data.json"
    manifest.write_text(json.dumps(rows))
    return manifest


def clip_preprocess(side_px: int) -> dict[str, Preprocess]:
    """Return the preprocessing of a CLIP encoder of some side, by its role; the encoder itself has no weights."""
    with torch.device("meta"):
        model = CLIPVisionModelWithProjection(CLIPVisionConfig(image_size=side_px, num_hidden_layers=1))
    return {"image": ClipEncoder(model, Path("none"), "no weights").preprocess}


def raw_batches(files: Files, images: int, prompt_px: int, *, pin: bool) -> Iterator[Batch]:
    """Batches without end, of pictures that are decoded, cut and preprocessed anew for each step."""
    config = DataConfig(train_batch_size=images, **files.settings)
    manifest = read_manifest(config)
    bucketing = assign_buckets(manifest, config)
    samples = TrainingSet(manifest, config, bucketing, seed=0, preprocess=clip_preprocess(prompt_px))
    sampler = Sampler(bucketing.bucket_of_row, seed=0, batch_images=images)
    log = FaultLog(files.manifest.parent, manifest.entries, config.max_fault_rate)
    return Loader(samples, sampler, log, samples.config.micro_images, pin=pin).from_step(0)
