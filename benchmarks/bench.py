"""The command: `python -m benchmarks.bench --sizes tiny,half,sd15 --device auto --out bench`."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from benchmarks import report
from benchmarks.aside import Failed
from benchmarks.compared import Bench, Setting
from benchmarks.our_step import TECHNIQUES
from benchmarks.report import Row
from benchmarks.sizes import SIZES
from benchmarks.whole_run import SIDES_PX

Job = tuple[str, Callable[[], Iterator[Row]]]

PARTS = ("counts", "settings", "whole", "largest", "techniques")
COUNTED = (("sd15", 512), ("sdxl", 1024))  # whose operations are counted in every run
# Techniques by default: on a CPU not what takes minutes to compile, on a GPU not what is for memory or CPUs' products.
TRIED = {
    "cpu": [name for name in TECHNIQUES if name not in ("compile", "reduce-overhead")],
    "cuda": ["lean_layers", "channels_last", "fused_optimizer", "reduce-overhead", "compile"],
}


class OutOfTime(Exception):
    """The command's time is up."""


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench", description=__doc__)
    parser.add_argument("--sizes", default="tiny,half,sd15", help="out of " + ", ".join(SIZES))
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--parts", default=",".join(PARTS), help="what to measure; largest batches on a GPU only")
    parser.add_argument("--rounds", type=int, default=3, help="timed turns of each side")
    parser.add_argument(
        "--techniques",
        help=f"to try at each size's first setting but tiny's, out of {', '.join(TECHNIQUES)}; default: all but the "
        "last two, which take minutes to compile; on a GPU " + ", ".join(TRIED["cuda"]),
    )
    parser.add_argument("--threads", type=int, help="threads of each side; default: as torch chooses")
    parser.add_argument("--minutes", type=float, default=60, help="it ends after this, whatever is under way")
    parser.add_argument("--out", type=Path, default=Path("bench"))
    return parser.parse_args()


def jobs(bench: Bench, sizes: Sequence[str], parts: Sequence[str], techniques: Sequence[str]) -> Iterator[Job]:
    """What there is to measure, each with its name; of the settings, the first of every size come first."""
    runs = {
        size: [Setting(size, *run, bench.device) for run in SIZES[size].runs.get(bench.device, ())] for size in sizes
    }
    if "counts" in parts:
        for size, side_px in COUNTED:
            yield f"operations of {size}", partial(bench.flops, size, side_px)
        yield "rows fed to a step", bench.rows
    firsts = [settings[0] for settings in runs.values() if settings]
    if "settings" in parts:
        yield "the roof", bench.measure_roof
        for number in range(max(map(len, runs.values()))):
            for settings in runs.values():
                for setting in settings[number : number + 1]:
                    yield setting.name, partial(bench.setting, setting, is_first=number == 0)
    if "whole" in parts:
        yield from ((f"whole runs of {size}", partial(bench.whole, size)) for size in sizes if size in SIDES_PX)
    if "largest" in parts and bench.device == "cuda":
        yield from ((f"largest batches of {s.size}", partial(bench.largest, s)) for s in firsts)
    if "techniques" in parts:
        for setting in firsts:
            for name in techniques if setting.size != "tiny" else ():
                yield f"{name}, {setting.name}", partial(bench.technique, setting, name)


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Breaks off its block when the time is up.

    Raises:
        OutOfTime: it is.
    """

    def end(number: int, frame: object) -> None:
        """Whatever is waited for."""
        raise OutOfTime

    previous = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def measure_all(bench: Bench, todo: Sequence[Job], seconds: float, out: Path, facts: Sequence[str]) -> None:
    """Does one job after the other; what is known stands in the report after every row, and what is missing with it.

    Args:
        bench: which knows facts and failures of its own.
        todo: jobs.
        seconds: after which the one under way is broken off.
        out: folder of the report.
        facts: further ones about the run.
    """
    began, rows, left = time.monotonic(), list[Row](), list(todo)

    def write() -> None:
        """The report as it stands."""
        missing = [*bench.missing, *(f"{name}: not measured to the end" for name, _ in left)]
        report.write(rows, out, [*facts, *bench.facts, *missing])

    try:
        with deadline(seconds):
            while left:
                name, job = left[0]
                print(f"{time.monotonic() - began:6.0f} s  {name}", file=sys.stderr, flush=True)
                try:
                    for row in job():
                        rows.append(row)
                        write()
                except Failed as error:
                    bench.missing.append(f"{name}: {error.reason}")
                    print(error.trace, file=sys.stderr)
                del left[0]
    except OutOfTime:
        print(f"{time.monotonic() - began:6.0f} s  out of time", file=sys.stderr)
    write()


def main() -> None:
    """Measures and writes; what fails, does not fit or comes too late is named in the report."""
    args = _arguments()
    import torch

    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error"}
    if args.threads:
        os.environ["OMP_NUM_THREADS"] = str(args.threads)
    techniques = TRIED[device] if args.techniques is None else [t for t in args.techniques.split(",") if t]
    args.out.mkdir(parents=True, exist_ok=True)
    facts = [f"command: `python -m benchmarks.bench {shlex.join(sys.argv[1:])}`", report.machine(device)]
    with tempfile.TemporaryDirectory(dir=args.out) as scratch:
        bench = Bench(device, args.rounds, Path(scratch).resolve())
        todo = list(jobs(bench, args.sizes.split(","), args.parts.split(","), techniques))
        measure_all(bench, todo, 60 * args.minutes, args.out, facts)
    print((args.out / "ratios.md").read_text())


if __name__ == "__main__":
    main()
