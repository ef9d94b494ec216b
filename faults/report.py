"""The lab's findings as JSON and as a table."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from faults.experiments import EXPERIMENTS
from faults.lab import Finding
from ip_adapter_trainer.storage.staging import staged_file

_ORDER = {name: number for number, name in enumerate(EXPERIMENTS)}


def merge(file: Path, findings: Iterable[Finding]) -> list[Finding]:
    """Puts findings in the place of those of the same faults in a report, the others behind those of their experiment.

    Experiments stand in the order in which a full run does them.
    """
    found = {finding.fault: finding for finding in read(file)}
    found |= {finding.fault: finding for finding in findings}
    return _write(file, found.values())


def drop(file: Path, experiment: str) -> None:
    """Takes out of a report what an experiment found earlier: should it break off now, none of it is current."""
    _write(file, [finding for finding in read(file) if finding.experiment != experiment])


def _write(file: Path, findings: Iterable[Finding]) -> list[Finding]:
    ordered = sorted(findings, key=lambda finding: _ORDER.get(finding.experiment, -1))
    with staged_file(file) as stage:
        stage.write_text(json.dumps([asdict(finding) for finding in ordered], indent=1) + "\n")
    return ordered


def read(file: Path) -> list[Finding]:
    """The findings of a report; none if there is no report."""
    return [Finding(**entry) for entry in json.loads(file.read_text())] if file.exists() else []


def verdict(finding: Finding) -> str:
    """One word."""
    return "left out" if finding.passed is None else "passed" if finding.passed else "FAILED"


def table(findings: Iterable[Finding]) -> str:
    """A Markdown table, a line each."""
    lines = ["| fault | tries | lost | | what was done |", "|---|---|---|---|---|"]
    lines += [f"| {f.fault} | {f.tries:,} | {f.lost:,} | {verdict(f)} | {_cell(f.note)} |" for f in findings]
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")
