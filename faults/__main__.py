"""`python -m faults`: does the experiments, one after the other, and writes what they found."""

from __future__ import annotations

import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import tyro

from faults import report
from faults.experiments import EXPERIMENTS
from faults.lab import Finding, Lab
from ip_adapter_trainer.core.errors import first_line


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
        out: the report; with names, what other experiments found stays in it.
        work: folder to work in, which stays; by default one that is removed.
    """
    unknown = set(names) - EXPERIMENTS.keys()
    if unknown:
        print(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(EXPERIMENTS)}")
        return 2
    if not names:
        out.unlink(missing_ok=True)
    failed = 0
    with tempfile.TemporaryDirectory(prefix="faults-") if work is None else nullcontext(str(work)) as folder:
        lab = Lab(Path(folder), share, lanes)
        for name in names or EXPERIMENTS:
            began = time.monotonic()
            report.drop(out, name)
            for finding in _found(lab, name):
                failed += finding.passed is False
                report.merge(out, [finding])
                took = f"{time.monotonic() - began:.0f} s"
                print(f"{report.verdict(finding):>8}  {finding.fault}: {finding.lost} of {finding.tries} lost; "
                      f"{finding.note} ({took})", flush=True)  # fmt: skip
    print("\n" + report.table(report.read(out)))
    return 1 if failed else 0


def _found(lab: Lab, name: str) -> Iterator[Finding]:
    """What an experiment finds; that it breaks off is a finding as well."""
    try:
        for finding in EXPERIMENTS[name](lab):
            yield replace(finding, experiment=name)
    except Exception as error:
        traceback.print_exc()
        note = f"broke off: {type(error).__name__}: {first_line(error)}"
        yield Finding(f"the experiment {name}", 1, 1, False, note, name)
    finally:
        lab.end()


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
