"""The lab's findings as JSON and as a table."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from faults.lab import Finding
from ip_adapter_trainer.core.staging import staged_file


def merge(file: Path, findings: Iterable[Finding]) -> list[Finding]:
    """Puts findings in the place of those of the same faults in a report, behind the others where there are none."""
    found = {finding.fault: finding for finding in read(file)}
    found |= {finding.fault: finding for finding in findings}
    with staged_file(file) as stage:
        stage.write_text(json.dumps([asdict(finding) for finding in found.values()], indent=1) + "\n")
    return list(found.values())


def read(file: Path) -> list[Finding]:
    """The findings of a report; none if there is no report."""
    return [Finding(**entry) for entry in json.loads(file.read_text())] if file.exists() else []


def verdict(finding: Finding) -> str:
    """One word."""
    return "left out" if finding.passed is None else "passed" if finding.passed else "FAILED"


def table(findings: Iterable[Finding]) -> str:
    """A Markdown table, a line each."""
    lines = ["| fault | tries | lost | | what was done |", "|---|---|---|---|---|"]
    lines += [f"| {f.fault} | {f.tries:,} | {f.lost:,} | {verdict(f)} | {f.note} |" for f in findings]
    return "\n".join(lines)
