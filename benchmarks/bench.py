"""The command: `python -m benchmarks.bench --sizes tiny,half,sd15 --device auto --out bench`."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import data_rate, limits, measure, report
from benchmarks.limits import Flops
from benchmarks.measure import Measured, Schedule
from benchmarks.our_step import ON_BY_DEFAULT, TECHNIQUES
from benchmarks.report import Row
from benchmarks.sizes import SIZES
from benchmarks.worker import Contender, DoesNotFit

COUNTED = (("sd15", 512), ("sdxl", 1024))  # whose operations are counted in every run
NAMES = {"no": "fp32", "bf16": "bf16"}
PUBLISHED = {"cpu": ("no", "bf16"), "cuda": ("bf16",)}  # precisions of the published step that are timed


@dataclass(frozen=True)
class Setting:
    """One size at one resolution and batch on a device."""

    size: str
    side_px: int
    images: int
    device: str

    @property
    def name(self) -> str:
        """As rows name it."""
        return f"{self.size} {self.side_px} px batch {self.images}"

    def contender(self, side: str, precision: str, *techniques: str) -> Contender:
        """One side in this setting."""
        return Contender(side, precision, self.size, self.side_px, self.images, self.device, techniques)


def aside(function: Callable[..., Any], *arguments: Any) -> Any:
    """Runs a function in a process of its own, so that this one stays small."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


class Bench:
    """One run over all settings; rows are yielded as they come."""

    def __init__(self, device: str, rounds: int, techniques: Sequence[str], scratch: Path) -> None:
        self.device, self.techniques, self.scratch = device, techniques, scratch
        self.rounds, self.roof = rounds, aside(limits.roof, device)
        self._counted: dict[tuple[str, int], tuple[Flops, Flops]] = {}

    def _schedule(self, setting: Setting) -> Schedule:
        if self.device == "cuda":
            return Schedule(self.rounds, untimed=2, timed=10 if setting.images < 8 else 3)
        return Schedule(self.rounds, untimed=0, timed=5 if setting.size == "tiny" else 1)

    def _count(self, size: str, side_px: int) -> tuple[Flops, Flops]:
        if (size, side_px) not in self._counted:
            self._counted[size, side_px] = aside(limits.count, size, side_px)
        return self._counted[size, side_px]

    def flops(self, size: str, side_px: int) -> Row:
        """The counted row of a size."""
        theirs, ours = self._count(size, side_px)
        name = f"{report.FLOPS}, {size} {side_px} px"
        ratio = theirs.total / ours.total
        return Row(name, self.device, theirs.total / 1e9, ours.total / 1e9, ratio, 0.0, None)

    def rows(self) -> Row:
        """The row of the data path: from pictures as they are read at each step, beside a prepared set."""
        pairs = aside(data_rate.rates, self.rounds)
        raw, prepared = ([1000 / pair[side] for pair in pairs] for side in (0, 1))
        return self._timed(f"{report.ROWS}, sd15 512 px", raw, prepared, None)

    def setting(self, setting: Setting, *, tries: bool) -> Iterator[Row]:
        """Everything about one setting; `tries`: the techniques too."""
        reference, parity = None, None
        for precision in PUBLISHED[self.device]:
            pair = setting.contender("published", precision), setting.contender("ours", "bf16")
            theirs, ours = measure.compare(pair, self._schedule(setting), self.scratch)
            if reference is None:
                reference = theirs.gradients if precision == "no" else self._reference(setting)
                yield from self._parity_in_fp32(setting, reference)
            if reference is not None and ours.gradients is not None:
                parity = measure.difference(ours.gradients, reference)
                if theirs.gradients is not None and theirs.gradients != reference:
                    error = measure.difference(theirs.gradients, reference)
                    name = f"{report.PARITY}, {setting.name}, bf16"
                    yield Row(name, self.device, error, parity, error / parity, None, parity)
            yield from self._rows(setting, theirs, ours, parity)
        for technique in self.techniques if tries else ():
            yield self._technique(setting, technique, reference)

    def _reference(self, setting: Setting) -> Path | None:
        try:
            return measure.gradients_only(setting.contender("published", "no"), self.scratch)
        except DoesNotFit:
            return None

    def _parity_in_fp32(self, setting: Setting, reference: Path | None) -> Iterator[Row]:
        if reference is None:
            return
        ours = measure.gradients_only(setting.contender("ours", "no"), self.scratch)
        error = measure.difference(ours, reference)
        yield Row(f"{report.PARITY}, {setting.name}, fp32", self.device, None, error, None, None, error)

    def _rows(self, setting: Setting, theirs: Measured, ours: Measured, parity: float | None) -> Iterator[Row]:
        against = f"{setting.name}, published {NAMES[theirs.contender.precision]}"
        timed = ((report.TIME, theirs.train_s, ours.train_s), (report.ENCODE, theirs.encode_s, ours.encode_s))
        for kind, a, b in timed:
            yield self._timed(f"{kind}, {against}", a, b, parity)
        counted = self._count(setting.size, setting.side_px)
        seconds = (median(theirs.train_s), median(ours.train_s))
        shares = [(f.total - f.attention) / s / self.roof for f, s in zip(counted, seconds, strict=True)]
        once = (
            (report.ROOF, *shares),
            (report.PEAK, theirs.peak_bytes / 1e9, ours.peak_bytes / 1e9),
            (report.BYTES, theirs.save_bytes / 1e6, ours.save_bytes / 1e6),
            (report.STALL, theirs.save_s, ours.save_s),
        )
        for kind, one, other in once:
            yield Row(f"{kind}, {against}", self.device, one, other, one / other, None, parity)

    def _timed(self, name: str, a: Sequence[float], b: Sequence[float], parity: float | None) -> Row:
        return Row(name, self.device, median(a), median(b), *measure.ratio_of(a, b), parity)

    def _technique(self, setting: Setting, technique: str, reference: Path | None) -> Row:
        pair = setting.contender("ours", "bf16"), setting.contender("ours", "bf16", technique)
        if technique in ON_BY_DEFAULT:
            pair = pair[1], pair[0]
        without, switched = measure.compare(pair, self._schedule(setting), self.scratch)
        parity = measure.difference(switched.gradients, reference) if switched.gradients and reference else None
        return self._timed(f"{report.TECHNIQUE} {technique}, {setting.name}", without.train_s, switched.train_s, parity)

    def largest(self, setting: Setting) -> Iterator[Row]:
        """Each side by itself at the largest batch that it can hold."""
        sides = []
        for side in ("published", "ours"):
            found, images = measure.alone(setting.contender(side, "bf16"), self._schedule(setting), self.scratch)
            sides.append((median(found.train_s), images))
        (theirs, most), (ours, our_most) = sides
        name = f"{report.TIME}, {setting.size} {setting.side_px} px, each at its largest batch ({most} and {our_most})"
        yield Row(name, self.device, theirs, ours, theirs / ours, None, None)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench", description=__doc__)
    parser.add_argument("--sizes", default="tiny,half,sd15", help="out of " + ", ".join(SIZES))
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--rounds", type=int, default=3, help="timed turns of each side")
    parser.add_argument(
        "--techniques",
        default=",".join(name for name in TECHNIQUES if name != "compile"),
        help="switches to try at each size's first setting but tiny's; not compile: minutes on a CPU",
    )
    parser.add_argument("--threads", type=int, help="threads of each side; default: as torch chooses")
    parser.add_argument("--minutes", type=float, default=60, help="no further setting is begun after this")
    parser.add_argument("--out", type=Path, default=Path("bench"))
    return parser.parse_args()


def _alone(measure: Callable[..., Row], *of: Any) -> Iterator[Row]:
    yield measure(*of)


def jobs(bench: Bench, sizes: Sequence[str]) -> Iterator[tuple[str, Callable[[], Iterator[Row]]]]:
    """What there is to measure, each with its name: counts, then settings, then largest batches."""
    for size, side_px in COUNTED:
        yield f"operations of {size}", partial(_alone, bench.flops, size, side_px)
    yield "rows fed to a step", partial(_alone, bench.rows)
    for size in sizes:
        runs = SIZES[size].runs.get(bench.device, ())
        for number, (side_px, images) in enumerate(runs):
            setting = Setting(size, side_px, images, bench.device)
            yield setting.name, partial(bench.setting, setting, tries=number == 0 and size != "tiny")
        if bench.device == "cuda" and runs:
            setting = Setting(size, runs[0][0], 1, bench.device)
            yield f"largest batches of {size}", partial(bench.largest, setting)


def main() -> None:
    """Measures and writes; a setting that does not fit, or comes too late, is named in the report."""
    args = _arguments()
    import torch

    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error"}
    if args.threads:
        os.environ["OMP_NUM_THREADS"] = str(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    began, rows, missing = time.monotonic(), list[Row](), list[str]()
    with tempfile.TemporaryDirectory(dir=args.out) as scratch:
        bench = Bench(device, args.rounds, [t for t in args.techniques.split(",") if t], Path(scratch))
        for name, job in jobs(bench, args.sizes.split(",")):
            if time.monotonic() - began > 60 * args.minutes:
                missing.append(f"{name}: not measured, out of time")
                continue
            print(f"{time.monotonic() - began:6.0f} s  {name}", file=sys.stderr, flush=True)
            try:
                rows += job()
            except DoesNotFit as error:
                missing.append(f"{name}: does not fit ({error})")
    command = f"command: `python -m benchmarks.bench {shlex.join(sys.argv[1:])}`"
    measured_roof = f"measured roof: {bench.roof / 1e9:,.0f} GFLOP/s in bf16"
    report.write(rows, args.out, [command, report.machine(device), measured_roof, *missing])
    print((args.out / "ratios.md").read_text())


if __name__ == "__main__":
    main()
