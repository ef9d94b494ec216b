"""The same images under the same noise, however many processes share them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from faults import witness
from faults.lab import Finding, Lab
from ip_adapter_trainer.train.checkpoint import WEIGHTS

IMAGES, STEPS = 4, 12  # a step; in all
WORLDS = (1, 2, 4)
# Steps that follow the gradient, where AdamW would blow up the rounding of gradients near zero.
_PLAIN = {"optimizer": "adamw", "adam_epsilon": 1.0, "learning_rate": 1.0, "lr_scheduler": "constant"}
_TOLERANCE = 1e-4  # of a weight, relative to the largest of its tensor


def same_draws(lab: Lab) -> Iterator[Finding]:
    """One, two and four processes; a run that changes their number twice; pictures and a prepared set."""
    place = lab.place("worlds")
    prepared = {"prepared_dir": place / "set"}
    code, said = lab.run("prepare", {**lab.inputs, **prepared, "random_flip": True})
    assert code == 0, said
    kinds: dict[str, dict[str, Any]] = {"pictures": {"dataloader_num_workers": 1}, "a prepared set": prepared}
    for number, (name, more) in enumerate(kinds.items()):
        yield _compared(lab, place / str(number), name, more)


def _compared(lab: Lab, place: Path, name: str, more: Mapping[str, Any]) -> Finding:
    place.mkdir()
    runs = {f"{world} processes": _run(lab, place / str(world), [(world, STEPS)], more) for world in WORLDS}
    changing = [(2, STEPS // 3), (1, 2 * STEPS // 3), (4, STEPS)]
    runs["2, then 1, then 4 processes"] = _run(lab, place / "changing", changing, more)
    one = runs["1 processes"]
    assert len(one) == IMAGES * STEPS, f"{len(one)} images were seen"
    wrong = [run for run, lines in runs.items() if lines != one]
    furthest = max(_distance(place / "1", place / other) for other in ("2", "4", "changing"))
    note = (
        f"(image, row, caption, dropped, noise, timestep, pixels) of {len(one)} images of 1, 2 and 4 processes, "
        f"and of a run resumed with 1 and 4 after 2; weights differ by {furthest:.0e} at most; "
        f"other lists: {len(wrong)}"
    )
    passed = not wrong and furthest <= _TOLERANCE
    return Finding(f"the number of processes changes, {name}", len(runs) - 1, len(wrong), passed, note)


def _run(lab: Lab, output: Path, legs: list[tuple[int, int]], more: Mapping[str, Any]) -> list[str]:
    """Trains leg by leg, each by so many processes up to a step; what was seen."""
    lines = output.with_name(f"{output.name}-seen")
    lines.mkdir()
    for processes, last in legs:
        flags = lab.training(
            output, max_train_steps=last, save_steps=STEPS // 3, train_batch_size=IMAGES // processes,
            random_flip=True, text_drop_rate=0.3, image_drop_rate=0.3, both_drop_rate=0.1,
            resume_from_checkpoint="latest", **_PLAIN, **more,
        )  # fmt: skip
        how: dict[str, Any] = {"processes": processes, "script": "faults.witness"}
        code, said = lab.run("train", flags, environment={witness.FOLDER: str(lines)}, **how)
        assert code == 0, said
    return witness.seen(lines)


def _distance(a: Path, b: Path) -> float:
    """The largest difference of a weight, relative to the largest of its tensor."""
    mine, other = (torch.load(p / f"checkpoint-{STEPS}" / WEIGHTS, weights_only=True) for p in (a, b))
    return max(float((mine[k] - other[k]).abs().max() / mine[k].abs().max().clamp(min=1e-12)) for k in mine)
