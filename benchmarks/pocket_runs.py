"""Training runs on the pocket world by `ip-adapter train` itself, and what their checkpoints can do."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ip_adapter_trainer.core.rng import stream
from ip_adapter_trainer.core.settings import as_flags
from ip_adapter_trainer.core.values import Batch, Geometry, Pixels
from ip_adapter_trainer.demo import ASKED_OF_IMAGE, ASKED_OF_TEXT, Pair, score
from ip_adapter_trainer.diffusion import NoiseProcess, ObjectiveConfig
from ip_adapter_trainer.evaluate.losses import SHUFFLED, Gap, validation_losses
from ip_adapter_trainer.evaluate.sample import Sampling, image_features, sample
from ip_adapter_trainer.pocket import world, write
from ip_adapter_trainer.pocket.world import Scene

if TYPE_CHECKING:
    from ip_adapter_trainer.model import Model

Settings = Mapping[str, Any]
BATCH_IMAGES = 32
ROWS, PAIRS = 256, 100  # of validation; scored
TEXT_NOISE = 0.03  # two standard errors of a score of 98 % on 100 pairs
STEPS, GUIDANCE = 25, 4.0  # of the sampler, as in the demo


@dataclass(frozen=True)
class Laid:
    """The base model, the encoder and the training rows of one seed, encoded once."""

    folder: Path
    seed: int

    @classmethod
    def of(cls, work: Path, seed: int) -> Laid:
        """Lays and prepares them, unless that was done before."""
        laid = cls(work / f"seed-{seed}", seed)
        if not laid.prepared.exists():
            write.write_pocket(laid.folder, seed=seed)
            _ip_adapter("prepare", {**laid.flags, "encode_batch_size": 32, "both_features": True})
        return laid

    @property
    def prepared(self) -> Path:
        """The prepared set."""
        return self.folder / "prepared"

    @property
    def flags(self) -> dict[str, Any]:
        """What every command on these rows is given."""
        here = self.folder
        return {
            "pretrained_model_name_or_path": here / "base", "image_encoder_path": here / "image_encoder",
            "data_json_file": here / "data.json", "data_root_path": here / "images", "resolution": world.SIZE_PX,
            "prepared_dir": self.prepared, "mixed_precision": "no",
        }  # fmt: skip


def _ip_adapter(command: str, settings: Settings) -> str:
    """Runs a command in a process of its own; returns what it said."""
    argv = [sys.executable, "-m", "ip_adapter_trainer", command, *as_flags(settings)]
    done = subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"{command} ended with {done.returncode}:\n{done.stdout[-2000:]}")
    return done.stdout


@dataclass(frozen=True)
class Run:
    """One training run with a checkpoint at every mark."""

    folder: Path

    @classmethod
    def of(cls, laid: Laid, recipe: Settings, *, steps: int, every: int) -> Run:
        """Trains by a recipe, which is what the defaults do but for its settings; unless that was done before."""
        settings = json.dumps({"steps": steps, **recipe}, sort_keys=True, default=str)
        run = cls(laid.folder / "runs" / sha256(settings.encode()).hexdigest()[:16])
        if not run.checkpoint(steps).exists():
            shutil.rmtree(run.folder, ignore_errors=True)  # one that was broken off has no seconds to tell
            own = {
                "train_batch_size": BATCH_IMAGES, "max_train_steps": steps, "save_steps": every, "seed": laid.seed,
                "output_dir": run.folder, "num_validation_images": 0, "grid_rows": 0, "report_to": "none",
            }  # fmt: skip
            _ip_adapter("train", {**laid.flags, **own, **recipe})
        return run

    def checkpoint(self, step: int) -> Path:
        """The checkpoint of a mark."""
        return self.folder / f"checkpoint-{step}"

    def seconds(self, step: int) -> float:
        """From the first step to a mark's checkpoint: the settings are written just before the first step."""
        begun = (self.folder / "config.yaml").stat().st_mtime
        return round((self.checkpoint(step) / "manifest.json").stat().st_mtime - begun, 1)


@dataclass(frozen=True)
class Mark:
    """What an adapter can do after some steps."""

    step: int
    seconds: float  # of training
    gap: float  # validation loss with shuffled pictures minus that with the right ones
    gap_error: float  # standard error
    loss: float
    scores: dict[str, float]  # fractions by attribute; empty where none were drawn

    def reaches(self, goal: Mark) -> bool:
        """Whether gap and image scores are the goal's or better, and the text score no worse than by its noise."""
        if self.gap < goal.gap or not self.scores:
            return False
        text = all(self.scores[name] >= goal.scores[name] - TEXT_NOISE for name in ASKED_OF_TEXT)
        return text and all(self.scores[name] >= goal.scores[name] for name in ASKED_OF_IMAGE)


class Measure:
    """Gap and scores of checkpoints, always on the same rows, pairs, noise and timesteps of one seed.

    Args:
        laid: whose models are measured with.
        held: whether rows and pairs are combinations that nothing was trained on, or those that training draws from.
    """

    def __init__(self, laid: Laid, *, held: bool) -> None:
        self.laid, self.held = laid, held
        self._model: Model | None = None

    def __call__(self, run: Run, step: int, goal: Mark | None = None) -> Mark:
        """The mark of one checkpoint; with a goal, scores are drawn only where the gap reaches it."""
        model = self._with(run.checkpoint(step))
        gap, loss = self._gap(model)
        scores = self._scores(model) if goal is None or gap.mean >= goal.gap else {}
        return Mark(step, run.seconds(step), gap.mean, gap.standard_error or 0.0, loss, scores)

    def _with(self, checkpoint: Path) -> Model:
        from ip_adapter_trainer.loading.adapter import load_model, read_adapter_into

        if self._model is None:
            base, encoder = (str(self.laid.folder / name) for name in ("base", "image_encoder"))
            self._model = load_model(str(checkpoint), base, encoder, dtype=torch.float32, device="cpu")
        read_adapter_into(self._model, checkpoint)
        return self._model

    def _gap(self, model: Model) -> tuple[Gap, float]:
        """Timesteps lie evenly over all that the base model has, however the run drew them."""
        process = NoiseProcess(model.denoiser.pipeline.scheduler, ObjectiveConfig())
        report = validation_losses(model, process, self._batches, seed=self.laid.seed)
        return report.gaps[SHUFFLED], report.losses["right"]

    @cached_property
    def _batches(self) -> list[Batch]:
        """Validation rows as training has them: another shape in the prompt, captions that name the shape only."""
        assert self._model is not None
        rng = stream(self.laid.seed, "fewer-steps-rows")
        targets = [world.random_scene(rng, held=self.held) for _ in range(ROWS)]
        shapes = [str(rng.choice(world.SHAPES)) for _ in targets]
        prompts = [world.random_pose(replace(t, shape=s), rng) for t, s in zip(targets, shapes, strict=True)]
        preprocess, parts = self._model.encoder.preprocess, range(0, ROWS, 64)
        return [_batch(i, targets[i : i + 64], prompts[i : i + 64], preprocess) for i in parts]

    @cached_property
    def pairs(self) -> list[Pair]:
        """Text asks for one shape, the reference shows another in the attributes wanted."""
        rng, pairs = stream(self.laid.seed, "fewer-steps-pairs"), list[Pair]()
        while len(pairs) < PAIRS:
            reference = world.random_scene(rng, held=self.held)
            shape = str(rng.choice([s for s in world.SHAPES if s != reference.shape]))
            if world.held_out(replace(reference, shape=shape)) == self.held:
                pairs.append(Pair(shape, reference))
        return pairs

    def _scores(self, model: Model) -> dict[str, float]:
        how = Sampling(world.SIZE_PX, world.SIZE_PX, steps=STEPS, guidance_scale=GUIDANCE, batch_images=50)
        features = image_features(model, [[_image(p.reference)] for p in self.pairs])
        prompts = [world.caption(replace(p.reference, shape=p.text_shape), ASKED_OF_TEXT) for p in self.pairs]
        return score(sample(model, features, prompts, range(len(self.pairs)), how), self.pairs)


def _image(scene: Scene) -> Any:
    from PIL import Image

    return Image.fromarray(world.render(scene))


def _batch(first: int, targets: Sequence[Scene], prompts: Sequence[Scene], preprocess: Any) -> Batch:
    """Rows as training reads them, nothing dropped."""
    places, square = torch.arange(first, first + len(targets)), (world.SIZE_PX, world.SIZE_PX)
    pixels = torch.from_numpy(np.stack([world.render(s) for s in targets])).permute(0, 3, 1, 2).float() / 127.5 - 1
    shown = torch.stack([preprocess(_image(s)) for s in prompts])
    no = torch.zeros(len(targets), dtype=torch.bool)
    geometry = (Geometry(square, (0, 0), square),) * len(targets)
    texts = tuple(world.caption(s, ASKED_OF_TEXT) for s in targets)
    return Batch(places, places, Pixels(pixels, {"image": shown}), texts, geometry, no, no)
