"""Writers of ICC profiles, and numpy's own idea of what their colours are in sRGB."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

import numpy as np

from faults.corpus.files import Array

Curve = Callable[[Array], Array]  # from samples in 0..1 to light in 0..1
Primaries = tuple[tuple[float, float], tuple[float, float], tuple[float, float]]  # xy of red, green, blue

D50, D65 = (0.3457, 0.3585), (0.3127, 0.3290)
SRGB_PRIMARIES = ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06))
ADOBE_RGB = ((0.64, 0.33), (0.21, 0.71), (0.15, 0.06))
DISPLAY_P3 = ((0.68, 0.32), (0.265, 0.69), (0.15, 0.06))
PROPHOTO = ((0.734699, 0.265301), (0.159597, 0.840403), (0.036598, 0.000105))

_BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
_WHITE = (0.9642, 1.0, 0.8249)  # of the space between profiles
_INKS = np.array([[-22, -12, -14], [-26, 22, -4], [-8, -4, 22], [-44, -6, -4]])  # what cyan, magenta, yellow, black add


def gamma(power: float) -> Curve:
    """The curve of a power."""
    return lambda samples: np.asarray(samples**power)


def srgb_curve(samples: Array) -> Array:
    """The curve of sRGB (IEC 61966-2-1)."""
    return np.where(samples <= 0.04045, samples / 12.92, ((samples + 0.055) / 1.055) ** 2.4)


def dot_gain(samples: Array) -> Array:
    """A curve like that of printed gray, which darkens the middle."""
    ink = 1 - samples
    return np.asarray((1 - ink - 0.8 * ink * (1 - ink) * samples) ** 1.2)


def rgb_profile(primaries: Primaries, white: tuple[float, float], curve: Curve) -> bytes:
    """A profile of three primaries and one curve, held at 1024 samples."""
    tags = {f"{name}XYZ": _xyz(column) for name, column in zip("rgb", _to_xyz(primaries, white).T, strict=True)}
    return _profile(b"mntr", b"RGB ", b"XYZ ", tags | {f"{name}TRC": _table(curve) for name in "rgb"})


def gray_profile(curve: Curve) -> bytes:
    """A profile of gray."""
    return _profile(b"mntr", b"GRAY", b"XYZ ", {"kTRC": _table(curve)})


def cmyk_profile() -> bytes:
    """A printer's profile whose table holds `cmyk_to_lab` at the corners, between which that is straight."""
    inks = np.stack(np.meshgrid(*[[0.0, 1.0]] * 4, indexing="ij"), -1).reshape(-1, 4)
    lab = cmyk_to_lab(inks)
    values = np.rint(np.stack([lab[:, 0] * 652.8, (lab[:, 1] + 128) * 256, (lab[:, 2] + 128) * 256], -1)).astype(">u2")
    matrix = np.eye(3).ravel() * 65536
    head = struct.pack(">4s4xBBBx9i", b"mft2", 4, 3, 2, *matrix.astype(int).tolist()) + struct.pack(">HH", 2, 2)
    straight = struct.pack(">HH", 0, 65535)
    return _profile(b"prtr", b"CMYK", b"Lab ", {"A2B0": head + straight * 4 + values.tobytes() + straight * 3})


def cmyk_to_lab(inks: Array) -> Array:
    """CIELAB (D50) of inks in 0..1, [..., 4], all of which sRGB reaches; all inks together are black."""
    return np.asarray(np.array([100.0, 0, 0]) + inks @ _INKS)


def rgb_in_srgb(samples: Array, primaries: Primaries, white: tuple[float, float], curve: Curve) -> Array:
    """[..., 3] in 0..255 of a profile's colours as sRGB in 0..255; what sRGB does not reach is cut off."""
    return _xyz_to_srgb(curve(samples / 255) @ _to_xyz(primaries, white).T)


def gray_in_srgb(samples: Array, curve: Curve) -> Array:
    """[...] in 0..255 of a profile's gray as sRGB in 0..255."""
    return _encoded(curve(samples / 255))


def lab_in_srgb(lab: Array) -> Array:
    """CIELAB (D50) as sRGB in 0..255."""
    y = (lab[..., 0] + 16) / 116
    roots = np.stack([y + lab[..., 1] / 500, y, y - lab[..., 2] / 200], -1)
    return _xyz_to_srgb(np.where(roots > 6 / 29, roots**3, 3 * (6 / 29) ** 2 * (roots - 4 / 29)) * _WHITE)


def _xyz_to_srgb(xyz: Array) -> Array:
    return _encoded(xyz @ np.linalg.inv(_to_xyz(SRGB_PRIMARIES, D65)).T)


def _encoded(light: Array) -> Array:
    light = np.clip(light, 0, 1)
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


def _to_xyz(primaries: Primaries, white: tuple[float, float]) -> Array:
    """From linear light [3] to XYZ, its white brought to D50 by Bradford's method."""
    columns = np.array([_of_xy(*point) for point in primaries]).T
    columns = columns * np.linalg.solve(columns, _of_xy(*white))
    scale = (_BRADFORD @ _of_xy(*D50)) / (_BRADFORD @ _of_xy(*white))
    return np.asarray(np.linalg.inv(_BRADFORD) @ np.diag(scale) @ _BRADFORD @ columns)


def _of_xy(x: float, y: float) -> Array:
    return np.array([x / y, 1, (1 - x - y) / y])


def _fixed(values: Sequence[float]) -> bytes:
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def _xyz(values: Sequence[float]) -> bytes:
    return b"XYZ \0\0\0\0" + _fixed(values)


def _table(curve: Curve) -> bytes:
    values = np.rint(np.clip(curve(np.linspace(0, 1, 1024)), 0, 1) * 65535).astype(">u2")
    return struct.pack(">4s4xI", b"curv", len(values)) + values.tobytes()


def _profile(kind: bytes, space: bytes, between: bytes, tags: dict[str, bytes]) -> bytes:
    """A profile of version 2 with the tags that every one has."""
    tags = {"desc": struct.pack(">4s4xI5s81x", b"desc", 5, b"test\0"), "wtpt": _xyz(_WHITE), **tags}
    start, table, body = 132 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, value in tags.items():
        table += struct.pack(">4sII", name.encode(), start + len(body), len(value))
        body += value + bytes(-len(value) % 4)
    size = struct.pack(">I4sI", start + len(body), b"lcms", 0x02400000)
    head = size + kind + space + between + bytes(12) + b"acsp" + bytes(28) + _fixed(_WHITE)
    return head.ljust(128, b"\0") + table + body
