"""Whole runs from the command to the last checkpoint, each side with nothing but the flags that it must have.

    python -m benchmarks.whole_run lay FOLDER --size sd15        # models with random weights, and pictures
    python -m benchmarks.whole_run published FOLDER --size sd15  # a run of the published step on them

The published side loads its models as the published script does, reads picture files for each step in its own process,
trains in fp32 and saves at the end. Ours is `ip-adapter train`, which prepares a set and chooses its precision itself.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.aside import Failed

SIDES_PX = {"tiny": 32, "sd15": 256}
PICTURES, EPOCHS, IMAGES = 16, 3, 4  # of the set; passes over it; of a step
_STARTED = "began"  # holds the time of the first step, in seconds


@dataclass(frozen=True)
class Timed:
    """One whole run, in seconds."""

    total: float
    start: float  # of it, to the first step


def lay(folder: Path, name: str) -> None:
    """Writes base model, image encoder and pictures."""
    from transformers import CLIPImageProcessorPil

    from benchmarks.pictures import write_pictures
    from benchmarks.sizes import SIZES, build

    nets, side_px = build(SIZES[name], "cpu"), SIZES[name].image["image_size"]
    nets.pipeline.text_encoder.resize_token_embeddings(len(nets.pipeline.tokenizer))  # as every real base has them
    nets.pipeline.save_pretrained(folder / "base")
    nets.image_encoder.save_pretrained(folder / "image_encoder")
    sizes: dict[str, Any] = {"size": {"shortest_edge": side_px}, "crop_size": {"height": side_px, "width": side_px}}
    CLIPImageProcessorPil(**sizes).save_pretrained(folder / "image_encoder")
    (folder / "images").mkdir()
    write_pictures(folder / "images", SIDES_PX[name], PICTURES)


def train_as_published(folder: Path, name: str, device: str) -> None:
    """A run of the published step: models from their folders, pictures from their files, one save at the end."""
    import torch
    from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

    from benchmarks.pictures import Files, raw_batches
    from benchmarks.published_step import PublishedStep
    from benchmarks.sizes import SIZES, Nets, projector_weights

    base, size, where = folder / "base", SIZES[name], torch.device(device)
    nets: dict[str, Any] = {
        "unet": UNet2DConditionModel.from_pretrained(base, subfolder="unet"),
        "vae": AutoencoderKL.from_pretrained(base, subfolder="vae"),
        "text_encoder": CLIPTextModel.from_pretrained(base, subfolder="text_encoder"),
    }
    encoder: Any = CLIPVisionModelWithProjection.from_pretrained(folder / "image_encoder")
    for net in (*nets.values(), encoder):
        net.requires_grad_(False).to(where)
    words = CLIPTokenizer.from_pretrained(base, subfolder="tokenizer")
    scheduler = DDPMScheduler.from_pretrained(base, subfolder="scheduler")
    without: Any = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipeline = StableDiffusionPipeline(tokenizer=words, scheduler=scheduler, **nets, **without)
    step = PublishedStep(Nets(pipeline, encoder), projector_weights(size, where), "no", where)
    files = Files(folder / "images" / "data.json", PICTURES, SIDES_PX[name])
    batches = raw_batches(files, IMAGES, size.image["image_size"], pin=False)
    (folder / _STARTED).write_text(str(time.time()))
    for batch in islice(batches, EPOCHS * PICTURES // IMAGES):
        step.step(batch.to(where), step.draws(batch))
    step.save(folder / "published")


def _ours(folder: Path, name: str) -> list[str]:
    """The command with what it must know: models, rows, sizes of run and step."""
    flags = {
        "pretrained_model_name_or_path": folder / "base", "image_encoder_path": folder / "image_encoder",
        "data_json_file": folder / "images" / "data.json", "data_root_path": folder / "images",
        "resolution": SIDES_PX[name], "train_batch_size": IMAGES, "num_train_epochs": EPOCHS,
        "output_dir": folder / "ours",
    }  # fmt: skip
    return ["-m", "ip_adapter_trainer", "train", *(f"--{flag}={value}" for flag, value in flags.items())]


def _run(arguments: list[str]) -> tuple[float, float]:
    """Runs a command; returns the times of its beginning and end.

    Raises:
        Failed: it did.
    """
    began = time.time()
    done = subprocess.run([sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    ended = time.time()
    if done.returncode:
        raise Failed(f"{arguments[1:3]} ended with {done.returncode}", done.stdout[-3000:])
    return began, ended


def compared(folder: Path, name: str, device: str) -> tuple[Timed, Timed]:
    """The published side's run and ours, one after the other, over the same models and pictures.

    Our start is that of a run of one step from the pictures: where a set is prepared first, nobody waits for a start.
    """
    _run(["-m", "benchmarks.whole_run", "lay", str(folder), "--size", name])
    began, ended = _run(["-m", "benchmarks.whole_run", "published", str(folder), "--size", name, "--device", device])
    published = Timed(ended - began, float((folder / _STARTED).read_text()) - began)
    began, ended = _run(_ours(folder, name))
    total = ended - began
    shutil.rmtree(folder / "ours")
    began, _ = _run([*_ours(folder, name), "--max_train_steps=1", "--prepare=off"])
    return published, Timed(total, (folder / "ours" / "config.yaml").stat().st_mtime - began)


def main() -> None:
    """One of the two commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("lay", "published"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", default="sd15", choices=list(SIDES_PX))
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if args.what == "lay":
        lay(args.folder, args.size)
    else:
        train_as_published(args.folder, args.size, args.device)


if __name__ == "__main__":
    main()
