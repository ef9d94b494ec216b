"""Choice of another row's image for each row, to measure what a wrong image does."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

from ip_adapter_trainer.core.rng import stream


def others(images: Sequence[Hashable], seed: int, purpose: str) -> NDArray[np.int64] | None:
    """Choose for each row another one, with another image.

    Every row is chosen once, unless more than half of the rows share an image. The stream of seed and purpose decides.

    Returns:
        Numbers of the other rows, [rows]; None: there is only one image.
    """
    numbers = {image: number for number, image in enumerate(dict.fromkeys(images))}
    if len(numbers) < 2:
        return None
    image_of_row = np.array([numbers[image] for image in images])
    drawn = stream(seed, purpose).permutation(len(images))
    first = np.full(len(numbers), len(images))
    np.minimum.at(first, image_of_row[drawn], np.arange(len(images)))
    cycle = drawn[np.argsort(first[image_of_row[drawn]], kind="stable")]  # rows of one image side by side
    counts = np.bincount(image_of_row)
    partners = np.empty(len(images), np.int64)
    partners[cycle] = np.roll(cycle, counts.max())  # so far round that nobody meets its own image
    own = np.flatnonzero(image_of_row[partners] == image_of_row)  # of more than half the rows
    partners[own] = np.resize(cycle[image_of_row[cycle] != counts.argmax()], len(own))
    return partners
