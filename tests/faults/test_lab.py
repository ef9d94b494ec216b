"""A small part of the lab: real runs, killed, refused and filled up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from faults import report
from faults.experiments import EXPERIMENTS
from faults.lab import Finding, Lab

SHARES = {"folder": 0.1, "kills-saving": 0.015, "kills-export": 0.1, "configs": 0.03}


@pytest.mark.parametrize("name", SHARES)
def test_real_runs_lose_nothing(name: str, tmp_path: Path) -> None:
    findings = list(EXPERIMENTS[name](Lab(tmp_path, SHARES[name])))
    assert findings and not [f for f in findings if f.passed is False], report.table(findings)


def test_the_documentation_shows_the_report_as_it_is() -> None:
    root = Path(__file__).parents[2]
    found = report.read(root / "faults" / "report.json")
    assert found and report.table(found) in (root / "docs" / "reliability.md").read_text()


def test_a_finding_takes_the_place_of_the_older_one(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    first, other = Finding("a fault", 3, 1, False, "before"), Finding("another", 0, 0, None, "left out")
    report.merge(file, [first, other])
    after = [Finding("a fault", 5, 0, True, "mended"), other]
    assert report.merge(file, after[:1]) == report.read(file) == after
    assert json.loads(file.read_text())[0].keys() == {"fault", "tries", "lost", "passed", "note"}
    assert [report.verdict(f) for f in (first, *after)] == ["FAILED", "passed", "left out"]
