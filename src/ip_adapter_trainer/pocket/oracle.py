"""Reads the named attributes of a pocket picture from its pixels.

No weights: the palette, template masks and template patterns of `world.py` decide. Nothing that is trained imports
this module, so its verdict on a trained model is independent of what the model was trained with.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ip_adapter_trainer.pocket import world
from ip_adapter_trainer.pocket.world import ATTRIBUTES, BACKGROUNDS, COLOURS, PATTERNS, SHADE, SHAPES, SIZE_PX, Scene

_OFFSETS_PX = np.arange(-1.5, 1.51, 0.5)
_ANGLES_DEG = (-14.0, -7.0, 0.0, 7.0, 14.0)
_DIAMETERS_PX = (19.0, 21.0, 23.0, 25.0)


@dataclass(frozen=True)
class Verdict:
    """The attributes that the oracle sees in one image."""

    shape: str
    colour: str
    pattern: str
    background: str

    def matches(self, truth: dict[str, str]) -> dict[str, bool]:
        """Return, for each attribute named in `truth`, whether this verdict agrees."""
        return {name: getattr(self, name) == value for name, value in truth.items()}


@lru_cache(maxsize=1)
def _shape_templates() -> tuple[list[str], np.ndarray, np.ndarray]:
    """Names [T], centred masks' conjugate spectra [T, S, S//2+1] and areas [T]."""
    scenes = [
        Scene(shape, "red", "plain", "white", diameter_px=d, angle_deg=a)
        for shape in SHAPES
        for d in _DIAMETERS_PX
        for a in _ANGLES_DEG
    ]
    masks = np.stack([world.coverage(s) for s in scenes])
    return [s.shape for s in scenes], np.conj(np.fft.rfft2(masks)), masks.sum((1, 2))


@lru_cache(maxsize=4096)
def _pattern_templates(x_half_px: int, y_half_px: int) -> np.ndarray:
    """Dark-tone shares [P, O, S, S] for patterns anchored around a centre given in half pixels."""
    centres = [(x_half_px / 2 + dx, y_half_px / 2 + dy) for dx in _OFFSETS_PX for dy in _OFFSETS_PX]
    return np.stack([np.stack([world.shade_share(p, x, y) for x, y in centres]) for p in PATTERNS])


def _nearest(rgb: np.ndarray, palette: dict[str, tuple[int, int, int]]) -> str:
    names, values = list(palette), np.array(list(palette.values()), np.float32)
    return names[int(((values - rgb) ** 2).sum(1).argmin())]


def _unmix(rgb: np.ndarray, light: np.ndarray, background: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Least-squares shares of the light tone and the dark tone in every pixel: cover [S, S], dark [S, S], residual.

    A pixel is background + a (light - background) + b (dark - background) with a, b in 0..1; cover is a + b, and dark
    is b / cover.
    """
    basis = np.stack([light - background, SHADE * light - background], 1)  # [3, 2]
    shares = (rgb - background).reshape(-1, 3) @ np.linalg.pinv(basis).T
    shares = np.clip(shares, 0, 1)
    residual = (((rgb - background).reshape(-1, 3) - shares @ basis.T) ** 2).sum(1)
    total = np.clip(shares.sum(1), 1e-6, None)
    cover, dark = np.clip(total, 0, 1), shares[:, 1] / total
    side = rgb.shape[0]
    return cover.reshape(side, side), dark.reshape(side, side), float(residual.mean())


def _read_colour(rgb: np.ndarray, background: np.ndarray) -> tuple[str, np.ndarray, np.ndarray]:
    """The colour whose two tones over this background explain the pixels best, with its cover and dark shares."""
    best = min(
        ((name, *_unmix(rgb, np.array(value, np.float32), background)) for name, value in COLOURS.items()),
        key=lambda row: row[3],
    )
    return best[0], best[1], best[2]


def _read_shape(cover: np.ndarray) -> tuple[str, float, float]:
    """The template mask with the largest intersection over union at its best shift, and the centre it implies."""
    names, spectra, areas = _shape_templates()
    overlap = np.fft.irfft2(np.fft.rfft2(cover)[None] * spectra, s=cover.shape)  # [T, S, S] for every circular shift
    iou = overlap / (areas[:, None, None] + cover.sum() - overlap + 1e-6)
    index, dy, dx = np.unravel_index(int(iou.argmax()), iou.shape)
    half = SIZE_PX // 2
    shift = [(int(d) + half) % SIZE_PX - half for d in (dx, dy)]
    return names[index], half + shift[0], half + shift[1]


def _read_pattern(cover: np.ndarray, dark: np.ndarray, x_px: float, y_px: float) -> str:
    """The pattern whose dark tone, anchored near the centre, differs least from the one seen inside the object."""
    templates = _pattern_templates(round(2 * x_px), round(2 * y_px))
    inside = cover > 0.8
    error = ((templates - dark) ** 2 * inside).sum((2, 3)).min(1)
    return PATTERNS[int(error.argmin())]


def read(image: np.ndarray) -> Verdict:
    """Read the attributes of one image, uint8 or float [SIZE_PX, SIZE_PX, 3] in 0..255."""
    rgb = np.asarray(image, np.float32)
    if rgb.shape != (SIZE_PX, SIZE_PX, 3):
        raise ValueError(f"the oracle reads {SIZE_PX}x{SIZE_PX} RGB pictures, not {rgb.shape}; resize first")
    edge = np.concatenate([rgb[0], rgb[-1], rgb[:, 0], rgb[:, -1]])
    background = _nearest(np.median(edge, axis=0), BACKGROUNDS)
    colour, cover, dark = _read_colour(rgb, np.array(BACKGROUNDS[background], np.float32))
    shape, x_px, y_px = _read_shape(cover)
    return Verdict(shape, colour, _read_pattern(cover, dark, x_px, y_px), background)


def accuracy(images: np.ndarray, truths: list[dict[str, str]]) -> dict[str, float]:
    """Return, for every attribute that truths name, the fraction of images [N, S, S, 3] whose verdict agrees."""
    if len(images) != len(truths):
        raise ValueError(f"{len(images)} pictures but {len(truths)} truths; give one truth per picture")
    hits: dict[str, list[bool]] = {}
    for image, truth in zip(images, truths, strict=True):
        for name, hit in read(image).matches(truth).items():
            hits.setdefault(name, []).append(hit)
    return {name: float(np.mean(hits[name])) for name in ATTRIBUTES if name in hits}
