"""The colour that transparent pictures are laid on."""

from __future__ import annotations

import re

Colour = tuple[int, int, int]

NAMED: dict[str, Colour] = {"white": (255, 255, 255), "black": (0, 0, 0), "gray": (128, 128, 128)}


def parse_colour(name: str) -> Colour:
    """Return red, green and blue in 0..255 of a named colour or '#rrggbb'.

    >>> parse_colour("#ff8000")
    (255, 128, 0)
    """
    if name in NAMED:
        return NAMED[name]
    if not re.fullmatch(r"#[0-9a-fA-F]{6}", name):
        raise ValueError(f"{name!r} is no colour; give {', '.join(NAMED)} or '#rrggbb'")
    red, green, blue = bytes.fromhex(name[1:])
    return red, green, blue
