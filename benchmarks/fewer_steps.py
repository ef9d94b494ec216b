"""How many steps a recipe needs for what the published one learns in 1,000, on the pocket world.

    python -m benchmarks.fewer_steps race                 # the defaults of `ip-adapter train`, seeds 0 to 4
    python -m benchmarks.fewer_steps race --names "Muon 3e-3"             # other recipes in their place
    python -m benchmarks.fewer_steps levers               # one change at a time, on a seed and pairs of its own
    python -m benchmarks.fewer_steps levers --under plus batch-4 --marks 100 200 --names "3e-4" "Muon 3e-3"

The published recipe (epsilon loss, uniform timesteps, 1e-4 constant, no warm-up, no average) is trained for `--steps`.
`race` trains the defaults for `--most` steps and looks for the first mark at which the validation gap and the score of
every attribute asked of the image are the published recipe's at its end or better, and the shape asked of the text is
no worse than by its noise. Rows, pairs, noise and timesteps of all measurements are the same for both, timesteps evenly
over all. Seconds are those of training, with the checkpoints at the marks and without any measuring. `levers` trains
each recipe to the last of `--marks`, under each of some conditions.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import product
from math import gcd
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.pocket_runs import BATCH_IMAGES, PAIRS, ROWS, Laid, Mark, Measure, Run, Settings
from ip_adapter_trainer.demo import ASKED_OF_IMAGE
from ip_adapter_trainer.train.config import PUBLISHED

FASTER = {"learning_rate": 3e-4, "lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 50}
LOGIT = {"timestep_density": "logit_normal", "logit_mean": 0.5, "timestep_uniform_share": 0.2}
BY_ADAMW = {**FASTER, **LOGIT, "lr_warmup_steps": None}  # a tenth of the run


def _muon(rate: float, layers: float = 1e-3) -> Settings:
    return {**BY_ADAMW, "optimizer": "muon", "projector_learning_rate": rate, "learning_rate": layers}


def _adamw(rate: float, projector: float | None = None) -> Settings:
    return {**BY_ADAMW, "learning_rate": rate, "projector_learning_rate": projector}


DEFAULTS = "defaults"
LEVERS: dict[str, Settings] = {  # each over the published recipe
    "published": {},
    "2e-4, warm-up": {**FASTER, "learning_rate": 2e-4},
    "3e-4, warm-up": FASTER,
    "logit-normal": LOGIT,
    "shifted by 3": {"timestep_density": "shifted", "timestep_shift": 3.0, "timestep_uniform_share": 0.0},
    "cubic": {"timestep_density": "cubic", "timestep_uniform_share": 0.0},
    "from timestep 400 on": {"min_timestep": 400},
    "min-SNR 5": {"snr_gamma": 5.0},
    "second moment 0.99": {"adam_beta2": 0.99},
    "2e-4, warm-up, logit-normal": {**FASTER, "learning_rate": 2e-4, **LOGIT},
    "3e-4, warm-up, logit-normal": {**FASTER, **LOGIT},
    "the same, mean 0": {**FASTER, **LOGIT, "logit_mean": 0.0},
    "the same, mean 1": {**FASTER, **LOGIT, "logit_mean": 1.0},
    "the same, no warm-up": {"learning_rate": 3e-4, **LOGIT},
    "the same, average 0.99": {**FASTER, **LOGIT, "use_ema": True, "ema_decay": 0.99},
    "AdamW 3e-4": _adamw(3e-4),
    "AdamW 1e-3": _adamw(1e-3),
    "AdamW 2e-3": _adamw(2e-3),
    "AdamW 5e-3": _adamw(5e-3),
    "AdamW 1e-3, projector 3e-3": _adamw(1e-3, 3e-3),
    "Muon 3e-4": _muon(3e-4),
    "Muon 1e-3": _muon(1e-3),
    "Muon 3e-3": _muon(3e-3),
    "Muon 1e-2": _muon(1e-2),
    "Muon 3e-2": _muon(3e-2),
    "Muon 3e-3, layers 3e-4": _muon(3e-3, 3e-4),
    "Muon 3e-3, layers 3e-3": _muon(3e-3, 3e-3),
    "Muon 3e-3 on all": {**_muon(3e-3), "optimizer": "muon_all"},
}
CONDITIONS: dict[str, Settings] = {
    "plain": {},
    "plus": {"variant": "plus"},
    "full": {"variant": "full"},
    "batch-4": {"train_batch_size": 4},
    "bf16": {"mixed_precision": "bf16", "prepared_dir": None, "prepare": "auto"},  # a set has one precision
    "cosine": {"lr_scheduler": "cosine"},
    "going-on": {},  # from the published recipe's adapter, after `--steps`
}


@dataclass(frozen=True)
class Raced:
    """One seed's result."""

    recipe: str
    seed: int
    published: Mark  # at its end
    ours: list[Mark]  # up to the first that reaches it, or to the last there is

    @property
    def reached(self) -> Mark | None:
        """The mark that reached it."""
        return self.ours[-1] if self.ours[-1].reaches(self.published) else None

    def as_json(self) -> dict[str, Any]:
        """Everything, as plain values."""
        found = self.reached
        return asdict(self) | {"steps": found and found.step, "seconds": found and found.seconds}


def race(laid: Laid, recipe: str, steps: int, most: int, every: int) -> Raced:
    """The published recipe to its end, then another until it is there."""
    settings = {} if recipe == DEFAULTS else {**PUBLISHED, **LEVERS[recipe]}
    measure = Measure(laid, held=True)
    goal = measure(Run.of(laid, PUBLISHED, steps=steps, every=steps), steps)
    run, ours = Run.of(laid, settings, steps=most, every=every), []
    for step in range(every, most + 1, every):
        ours.append(measure(run, step, goal))
        if ours[-1].reaches(goal):
            break
    return Raced(recipe, laid.seed, goal, ours)


def _scores(mark: Mark) -> str:
    return " / ".join(f"{100 * mark.scores[name]:.0f}" for name in (*ASKED_OF_IMAGE, "shape"))


def race_table(raced: Sequence[Raced]) -> str:
    """A row for each seed, and the means."""
    lines = [
        "| recipe | seed | published: steps | s | gap | colour / pattern / background / shape "
        "| recipe: steps | s | gap | scores | steps, published / recipe | seconds |",
        "|---" * 12 + "|",
    ]
    for r in raced:
        a, b = r.published, r.reached
        there = "not reached | | | | | |"
        if b:
            there = f"{b.step} | {b.seconds:.0f} | {b.gap:.4f} | {_scores(b)} | {a.step / b.step:.1f} |"
            there += f" {a.seconds / b.seconds:.1f} |"
        lines.append(f"| {r.recipe} | {r.seed} | {a.step} | {a.seconds:.0f} | {a.gap:.4f} | {_scores(a)} | {there}")
    if all(r.reached for r in raced):
        a_s, b_s = mean(r.published.seconds for r in raced), mean(r.ours[-1].seconds for r in raced)
        first, then = mean(r.published.step for r in raced), mean(r.ours[-1].step for r in raced)
        ratios = f"{first / then:.1f} | {a_s / b_s:.1f}"
        lines.append(
            f"| {raced[0].recipe} | mean | {first:.0f} | {a_s:.0f} | | | {then:.0f} | {b_s:.0f} | | | {ratios} |"
        )
    return "\n".join(lines)


def levers(
    laid: Laid, condition: str, names: Sequence[str], marks: Sequence[int], steps: int
) -> Iterator[tuple[str, Mark]]:
    """Every recipe at its marks under a condition."""
    measure, under = Measure(laid, held=False), dict(CONDITIONS[condition])
    if condition == "going-on":
        under["pretrained_ip_adapter_path"] = Run.of(laid, PUBLISHED, steps=steps, every=steps).checkpoint(steps)
    for name in names:
        run = Run.of(laid, {**PUBLISHED, **LEVERS[name], **under}, steps=max(marks), every=gcd(*marks))
        yield from ((name, measure(run, mark)) for mark in marks)


def _levers_row(condition: str, name: str, mark: Mark) -> str:
    gap = f"{mark.gap:.4f} ± {mark.gap_error:.4f}"
    return f"| {condition} | {name} | {mark.step} | {mark.seconds:.0f} | {gap} | {mark.loss:.4f} | {_scores(mark)} |"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fewer_steps",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=("race", "levers"))
    parser.add_argument("--seeds", type=int, nargs="+", help="default: 0 to 4 for race, 100 for levers")
    parser.add_argument("--steps", type=int, default=1000, help="of the published recipe")
    parser.add_argument("--every", type=int, default=25, help="steps between marks of race")
    parser.add_argument("--most", type=int, default=300, help="steps of what is raced against it")
    parser.add_argument("--marks", type=int, nargs="+", default=[500], help="steps at which levers measures")
    parser.add_argument("--under", nargs="+", choices=list(CONDITIONS), metavar="CONDITION", default=["plain"])
    names = [DEFAULTS, *LEVERS]
    parser.add_argument(
        "--names", nargs="+", choices=names, metavar="NAME", help="recipes; default: all, or the defaults"
    )
    parser.add_argument(
        "--work", type=Path, default=Path("bench/fewer-steps"), help="runs; what is there is not repeated"
    )
    parser.add_argument("--json", type=Path, help="file for the results")
    return parser.parse_args()


def main() -> None:
    """Measures, prints a table and writes the file."""
    args, found = _arguments(), []
    if args.what == "race":
        for name in args.names or [DEFAULTS]:
            raced = []
            for seed in args.seeds or range(5):
                raced.append(race(Laid.of(args.work, seed), name, args.steps, args.most, args.every))
                print(race_table(raced[-1:]).splitlines()[2], file=sys.stderr, flush=True)
            found += [r.as_json() for r in raced]
            print(race_table(raced))
    else:
        print("| under | recipe | steps | s | gap | validation loss | colour / pattern / background / shape |")
        print("|---" * 7 + "|")
        for seed, under in product(args.seeds or [100], args.under):
            for name, mark in levers(
                Laid.of(args.work, seed), under, args.names or list(LEVERS), args.marks, args.steps
            ):
                print(_levers_row(under, name, mark), flush=True)
                found.append({"seed": seed, "under": under, "recipe": name, "settings": LEVERS[name]} | asdict(mark))
    if args.json:
        about = {
            "command": f"python -m benchmarks.fewer_steps {shlex.join(sys.argv[1:])}", "published": PUBLISHED,
            "batch_images": BATCH_IMAGES, "validation_rows": ROWS, "scored_pairs": PAIRS,
            "machine": f"{platform.machine()}, torch {version('torch')}, diffusers {version('diffusers')}",
        }  # fmt: skip
        args.json.write_text(json.dumps(about | {"results": found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
