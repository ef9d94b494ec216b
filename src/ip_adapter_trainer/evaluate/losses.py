"""Validation losses: the same rows, noise and timesteps every time, with the right image, a wrong one and none.

A training loss hardly moves while an adapter learns. The gap between the right image and a wrong one under equal noise
is the answer: it is zero for an adapter that ignores its picture.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ip_adapter_trainer.core.rng import stream
from ip_adapter_trainer.core.values import Batch, ImageTokens
from ip_adapter_trainer.diffusion.objective import NoiseProcess
from ip_adapter_trainer.evaluate.sample import evaluation_mode, select
from ip_adapter_trainer.evaluate.shuffle import others
from ip_adapter_trainer.manifest.hold_out import LEAST_IMAGES
from ip_adapter_trainer.model import Features, Model
from ip_adapter_trainer.runtime.stopping import Poll, no_poll

BANDS = 5  # equal bands of timesteps; every row is looked at once in each
RIGHT, SHUFFLED, NONE = "right", "shuffled", "none"  # whose image a row is shown
Table = NDArray[np.float64]


@dataclass(frozen=True)
class Gap:
    """The rise of a row's loss when it is not shown its own image, over all rows."""

    mean: float
    standard_error: float | None  # of the mean, from the rows' paired differences; None: of one row
    loss: float  # with the right image

    @property
    def relative(self) -> float:
        """As a fraction of the loss with the right image."""
        return self.mean / self.loss

    @property
    def surely(self) -> int:
        """1 where the loss rises by more than two standard errors, -1 where it falls by as much, else 0."""
        error = math.inf if self.standard_error is None else self.standard_error
        return (self.mean > 2 * error) - (self.mean < -2 * error)

    def __str__(self) -> str:
        error = "" if self.standard_error is None else f" ± {self.standard_error / self.loss:.2%}"
        return f"{self.relative:+.2%}{error}"


@dataclass(frozen=True)
class ValidationReport:
    """Mean squared errors against the target, unweighted, on fixed rows. One row alone has no `shuffled`."""

    rows: int
    losses: dict[str, float]  # by whose image was shown: right, shuffled, none
    gaps: dict[str, Gap]  # shuffled, none
    by_band: dict[tuple[int, int], float]  # with the right image, by a band's first and last timestep

    def as_metrics(self, prefix: str = "validation") -> dict[str, float]:
        """Return the report as flat numbers for trackers and JSON."""
        metrics = {f"{prefix}/loss": self.losses[RIGHT]}
        for name, gap in self.gaps.items():
            metrics[f"{prefix}/loss_{name}"] = self.losses[name]
            metrics[f"{prefix}/gap_{name}"] = gap.mean
            metrics[f"{prefix}/gap_{name}_relative"] = gap.relative
        for (first, last), loss in self.by_band.items():
            metrics[f"{prefix}/loss_t{first:04d}-{last:04d}"] = loss
        return metrics

    @property
    def is_used(self) -> bool:
        """Return whether the rows' own images surely help, beside others' images and beside none."""
        return self.rows >= LEAST_IMAGES and all(gap.surely == 1 for gap in self.gaps.values())

    @property
    def verdict(self) -> str:
        """Answer whether the image prompt is being used."""
        if self.rows < LEAST_IMAGES:
            return f"too few images to judge by, {LEAST_IMAGES} are needed"
        beside_others, beside_none = self.gaps[SHUFFLED].surely, self.gaps[NONE].surely
        if beside_none == -1:
            return "the image makes it worse than none does"
        if beside_others == 1:
            used = "the image prompt is used"
            return used if beside_none == 1 else "the right image is better than another, but no better than none"
        if beside_none == 1:
            return "an image helps, but the right one no more than another"
        return "no sign yet that the image prompt is used"

    def summary(self, rows: str) -> str:
        """Return a line with what was measured on rows of this kind, such as "held-out rows", and the verdict."""
        words = {SHUFFLED: "with shuffled images", NONE: "without image"}
        gaps = ", ".join(f"{words[name]} {gap}" for name, gap in self.gaps.items())
        return f"loss {self.losses[RIGHT]:.4f} on {self.rows} {rows}; {gaps}: {self.verdict}"

    def overfits(self, unseen: ValidationReport) -> bool:
        """Return whether unseen rows surely gain less than half of what the image gives these, which are trained on."""
        if not self.is_used or unseen.rows < LEAST_IMAGES:
            return False
        gap = unseen.gaps[NONE]
        most = (gap.mean + 2 * (gap.standard_error or 0)) / gap.loss
        return most < self.gaps[NONE].relative / 2


def validation_losses(
    model: Model, process: NoiseProcess, batches: Sequence[Batch], seed: int, poll: Poll = no_poll
) -> ValidationReport:
    """Measure an adapter on fixed rows.

    Timesteps, noise and latents are drawn from each row's own counter (`Batch.index`) and the shuffle from all of them
    in order, so neither the size nor the order of the batches matters. Captions are kept; drop flags are not read.

    Args:
        model: attached or not; it is given back as it was found.
        process: the noise process; its loss weights and noise offset are left out, so that runs can be compared.
        batches: at least one row in all, each index once, each row with another image.
        seed: validation's own seed.
        poll: called before every forward pass.
    """
    indices = sorted(int(i) for batch in batches for i in batch.index)
    assert indices and len(set(indices)) == len(indices), "each row once"
    partners = others(indices, seed, "validation-shuffle")
    shown = [RIGHT, NONE] if partners is None else [RIGHT, SHUFFLED, NONE]
    errors: dict[str, Table] = {name: np.zeros((len(indices), BANDS)) for name in shown}
    with evaluation_mode(model):
        features = _features(model, batches, indices, poll)
        for batch in batches:
            rows = [indices.index(int(i)) for i in batch.index]
            images: dict[str, Features] = {RIGHT: select(features, rows), NONE: model.null(len(rows))}
            if partners is not None:
                images[SHUFFLED] = select(features, partners[rows])
            seen = {name: images[name] for name in shown}
            for name, band, row_errors in _errors(model, process, batch, seen, seed, poll):
                errors[name][rows, band] = row_errors
    return _report(errors, _edges(process))


def _features(model: Model, batches: Sequence[Batch], indices: list[int], poll: Poll) -> Features:
    """Image features [R, ...] of all rows, in the order of their indices."""
    parts: list[Features] = []
    for batch in batches:
        poll()
        parts.append(model.features_of(batch.inputs))
    places = np.argsort([int(i) for batch in batches for i in batch.index])
    return {need: torch.cat([part[need] for part in parts])[places] for need in parts[0]}


def _edges(process: NoiseProcess) -> list[int]:
    """The first timestep of each band, and the end."""
    return [process.num_timesteps * band // BANDS for band in range(BANDS + 1)]


def _draw(process: NoiseProcess, batch: Batch, shape: tuple[int, int, int], seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Posterior noise [B, C, h, w], noise [B, BANDS, C, h, w] and timesteps [B, BANDS] of a batch's rows."""
    edges = np.array(_edges(process))
    posterior, noise, timesteps = [], [], []
    for index in batch.index.tolist():
        posterior.append(stream(seed, "validation-posterior", index).standard_normal(shape, np.float32))
        noise.append(stream(seed, "validation-noise", index).standard_normal((BANDS, *shape), np.float32))
        timesteps.append(stream(seed, "validation-timestep", index).integers(edges[:-1], edges[1:]))
    p, n, t = (torch.from_numpy(np.stack(drawn)) for drawn in (posterior, noise, timesteps))
    return p, n, t


def _errors(
    model: Model, process: NoiseProcess, batch: Batch, images: dict[str, Features], seed: int, poll: Poll
) -> Iterator[tuple[str, int, Table]]:
    """Name of the image shown, band, and mean squared errors [B], for every image and band."""
    poll()
    codec, device = model.codec, model.denoiser.device
    moments = model.moments_of(batch.inputs)  # [B, 2C, h, w]
    shape = (moments.shape[1] // 2, *moments.shape[2:])
    posterior, noise, timesteps = _draw(process, batch, shape, seed)
    latents = codec.latents(moments, process.posterior(posterior))
    text, known = model.text_of(batch), dict[str, ImageTokens]()
    for band in range(BANDS):
        t, e = timesteps[:, band].to(device), noise[:, band].to(device)
        noisy, target = process.add_noise(latents, e, t).to(model.dtype), process.target(latents, e, t)
        for name, features in images.items():
            poll()
            if name not in known or model.variant.reads_time:
                known[name] = model.project(features, t)
            prediction = model.predict(noisy, t, text, batch.geometry, known[name]).float()
            yield name, band, (prediction - target).square().mean((1, 2, 3)).double().cpu().numpy()


def _report(errors: dict[str, Table], edges: list[int]) -> ValidationReport:
    """Means, paired gaps and bands of errors [R, BANDS]."""
    by_row = {name: table.mean(1) for name, table in errors.items()}
    losses = {name: float(row.mean()) for name, row in by_row.items()}
    gaps: dict[str, Gap] = {}
    for name in (name for name in by_row if name != RIGHT):
        more = by_row[name] - by_row[RIGHT]
        error = float(more.std(ddof=1)) / len(more) ** 0.5 if len(more) > 1 else None
        gaps[name] = Gap(float(more.mean()), error, losses[RIGHT])
    bands = {(edges[b], edges[b + 1] - 1): float(errors[RIGHT][:, b].mean()) for b in range(BANDS)}
    return ValidationReport(len(by_row[RIGHT]), losses, gaps, bands)
