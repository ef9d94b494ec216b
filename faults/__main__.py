"""`python -m faults`: does the experiments, one after the other, and writes what they found."""

from __future__ import annotations

import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import tyro

from faults import report
from faults.experiments import EXPERIMENTS
from faults.lab import Lab


def main(
    names: tyro.conf.Positional[tuple[str, ...]] = (),
    share: float = 1.0,
    lanes: int = 1,
    out: Path = Path("faults/report.json"),
    work: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None,
) -> int:
    """Hurts real runs on the pocket base and tells what was lost.

    Args:
        names: experiments to do; all of them by default.
        share: of the full number of tries.
        lanes: tries that are done side by side, where an experiment has many.
        out: the report; findings of experiments that are not done now stay in it.
        work: folder to work in, which stays; by default one that is removed.
    """
    unknown = set(names) - EXPERIMENTS.keys()
    if unknown:
        print(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(EXPERIMENTS)}")
        return 2
    failed = 0
    with tempfile.TemporaryDirectory(prefix="faults-") if work is None else nullcontext(str(work)) as folder:
        lab = Lab(Path(folder), share, lanes)
        for name in names or EXPERIMENTS:
            began = time.monotonic()
            for finding in EXPERIMENTS[name](lab):
                failed += finding.passed is False
                report.merge(out, [finding])
                took = f"{time.monotonic() - began:.0f} s"
                print(f"{report.verdict(finding):>8}  {finding.fault}: {finding.lost} of {finding.tries} lost; "
                      f"{finding.note} ({took})", flush=True)  # fmt: skip
    print("\n" + report.table(report.read(out)))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
