"""The pocket picture world: small pictures whose every attribute is known.

A picture shows one object on a plain background. Four attributes are named in its caption (shape, colour, pattern,
background); position, size and angle vary and are never named. Everything the embedded base model, the demo and
many tests need to know about truth starts here; reading truth back from pixels is `oracle.py`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

SIZE_PX = 32
_SUPERSAMPLE = 4  # shapes are drawn this many times larger and box-averaged, so edges carry exact coverage

SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 40, 44), "orange": (245, 140, 20), "yellow": (248, 222, 40), "green": (36, 158, 62),
    "cyan": (30, 190, 205), "blue": (38, 70, 214), "purple": (140, 48, 190), "pink": (248, 104, 178),
}  # fmt: skip
PATTERNS = ("plain", "striped", "dotted", "checked")
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (250, 250, 250), "gray": (134, 134, 138), "sand": (222, 198, 152), "sky": (172, 208, 242),
    "mint": (178, 232, 196), "brown": (104, 76, 58),
}  # fmt: skip
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "shape": SHAPES, "colour": tuple(COLOURS), "pattern": PATTERNS, "background": tuple(BACKGROUNDS),
}  # fmt: skip
SHADE = 0.42  # the second tone of a pattern is the colour darkened to this fraction
PERIOD_PX = 6.0  # stripes, dots and checks repeat after this many pixels
DIAMETER_PX = (19.0, 25.0)
SHIFT_PX = 2.5
ANGLE_DEG = 14.0


@dataclass(frozen=True)
class Scene:
    """One picture of the world: four named attributes and a pose that no caption tells."""

    shape: str
    colour: str
    pattern: str
    background: str
    x_px: float = SIZE_PX / 2
    y_px: float = SIZE_PX / 2
    diameter_px: float = 22.0
    angle_deg: float = 0.0

    def attributes(self) -> dict[str, str]:
        """Return the named attributes, in the order of `ATTRIBUTES`."""
        return {name: getattr(self, name) for name in ATTRIBUTES}


def held_out(scene: Scene) -> bool:
    """Return whether this combination of attributes is kept from everything that is trained (about one in five)."""
    digest = hashlib.sha256("|".join(scene.attributes().values()).encode()).digest()
    return digest[0] < 51


def combinations() -> list[Scene]:
    """Return every combination of attributes once, in canonical order, in the neutral pose."""
    return [Scene(s, c, p, b) for s in SHAPES for c in COLOURS for p in PATTERNS for b in BACKGROUNDS]


def random_pose(scene: Scene, rng: np.random.Generator, spread: float = 1.0) -> Scene:
    """Return the same attributes at a random position, size and angle; `spread` scales how far poses vary."""
    x, y = SIZE_PX / 2 + spread * rng.uniform(-SHIFT_PX, SHIFT_PX, 2)
    middle, reach = sum(DIAMETER_PX) / 2, (DIAMETER_PX[1] - DIAMETER_PX[0]) / 2
    diameter = middle + spread * rng.uniform(-reach, reach)
    angle = spread * rng.uniform(-ANGLE_DEG, ANGLE_DEG)
    return replace(scene, x_px=x, y_px=y, diameter_px=diameter, angle_deg=angle)


def random_scene(rng: np.random.Generator, *, held: bool | None = False, spread: float = 1.0) -> Scene:
    """Draw a uniform random scene: `held` False draws seen combinations only, True held-out ones, None any."""
    while True:
        shape, colour, pattern, background = (str(rng.choice(values)) for values in ATTRIBUTES.values())
        scene = Scene(shape, colour, pattern, background)
        if held is None or held_out(scene) == held:
            return random_pose(scene, rng, spread)


def caption(scene: Scene, named: Sequence[str] = tuple(ATTRIBUTES)) -> str:
    """Return the caption that names the given attributes: "a red striped star on a white background".

    A plain pattern has no word in running English, so it is named "plain" like the others. Without the shape the
    noun is "thing". No attribute at all gives the empty caption.
    """
    if not named:
        return ""
    words = ["a"] + [getattr(scene, name) for name in ("colour", "pattern") if name in named]
    words.append(scene.shape if "shape" in named else "thing")
    if "background" in named:
        words += ["on", "a", scene.background, "background"]
    return " ".join(words)


@cache
def _outline(shape: str) -> np.ndarray:
    """The unit outline (diameter 1, centred) of a shape as a polygon, [P, 2]."""
    turn = np.linspace(0, 2 * math.pi, 64, endpoint=False)
    if shape == "circle":
        return 0.48 * np.stack([np.cos(turn), np.sin(turn)], 1)
    if shape == "square":
        return 0.41 * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)], float)
    if shape == "triangle":
        corners = np.array([-90.0, 30.0, 150.0]) * math.pi / 180
        return 0.58 * np.stack([np.cos(corners), np.sin(corners)], 1) + (0, 0.08)
    if shape == "star":
        corners = np.arange(10) * math.pi / 5 - math.pi / 2
        radius = np.where(np.arange(10) % 2 == 0, 0.56, 0.235)
        return radius[:, None] * np.stack([np.cos(corners), np.sin(corners)], 1)
    if shape == "cross":
        a, h = 0.5, 0.165  # arm length, half of an arm's width
        quarter = [(-h, -a), (h, -a), (h, -h)]  # one arm; the others are its turns
        turns = [(1, 0, 0, 1), (0, -1, 1, 0), (-1, 0, 0, -1), (0, 1, -1, 0)]
        return np.array([(p * x + q * y, r * x + s * y) for p, q, r, s in turns for x, y in quarter])
    if shape == "heart":
        x = 16 * np.sin(turn) ** 3
        y = -(13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn))
        return np.stack([x, y - 2.5], 1) / 32
    raise ValueError(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")


def coverage(scene: Scene) -> np.ndarray:
    """Return the share of each pixel that the object covers, [SIZE_PX, SIZE_PX] in 0..1."""
    angle = math.radians(scene.angle_deg)
    turn = np.array([(math.cos(angle), -math.sin(angle)), (math.sin(angle), math.cos(angle))])
    points = (_outline(scene.shape) @ turn.T * scene.diameter_px + (scene.x_px, scene.y_px)) * _SUPERSAMPLE
    canvas = Image.new("L", (SIZE_PX * _SUPERSAMPLE,) * 2)
    ImageDraw.Draw(canvas).polygon([tuple(p) for p in points], fill=255)
    return np.asarray(canvas.reduce(_SUPERSAMPLE), np.float32) / 255


def shade_share(pattern: str, x_px: float, y_px: float) -> np.ndarray:
    """Return the share of each pixel in the dark tone of a pattern anchored at (x, y), [SIZE_PX, SIZE_PX] in 0..1."""
    grid = (np.arange(SIZE_PX * _SUPERSAMPLE) + 0.5) / _SUPERSAMPLE
    u, v = (grid - x_px) / PERIOD_PX, ((grid - y_px) / PERIOD_PX)[:, None]
    if pattern == "plain":
        dark = np.zeros((grid.size, grid.size), bool)
    elif pattern == "striped":
        dark = np.broadcast_to((v % 1.0) < 0.5, (grid.size, grid.size))
    elif pattern == "dotted":
        dark = ((u % 1.0) - 0.5) ** 2 + ((v % 1.0) - 0.5) ** 2 < 0.30**2
    elif pattern == "checked":  # a check is one period wide, so that it survives a fourfold reduction
        dark = ((u * 0.75) % 1.0 < 0.5) ^ ((v * 0.75) % 1.0 < 0.5)
    else:
        raise ValueError(f"unknown pattern {pattern!r}; known: {', '.join(PATTERNS)}")
    blocks = dark.reshape(SIZE_PX, _SUPERSAMPLE, SIZE_PX, _SUPERSAMPLE)
    return blocks.mean((1, 3), dtype=np.float32)


def render(scene: Scene) -> np.ndarray:
    """Render a scene as an image, uint8 [SIZE_PX, SIZE_PX, 3]."""
    light = np.array(COLOURS[scene.colour], np.float32)
    shade = shade_share(scene.pattern, scene.x_px, scene.y_px)[..., None]
    inside = light * (1 - shade) + SHADE * light * shade
    cover = coverage(scene)[..., None]
    background = np.array(BACKGROUNDS[scene.background], np.float32)
    return np.rint(inside * cover + background * (1 - cover)).astype(np.uint8)
