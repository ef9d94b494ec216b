"""A small part of the lab, real runs that are killed and refused; and its report."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from faults import report
from faults.__main__ import main
from faults.experiments import EXPERIMENTS
from faults.lab import Finding, Lab, Process

SHARES = {"kills-saving": 0.01, "kills-export": 0.025}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kills-saving", "kills-export"])
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
    assert json.loads(file.read_text())[0].keys() == {"fault", "tries", "lost", "passed", "note", "experiment"}
    assert [report.verdict(f) for f in (first, *after)] == ["FAILED", "passed", "left out"]


def _found(fault: str, experiment: str = "") -> Finding:
    return Finding(fault, 1, 0, True, "nothing lost", experiment)


@pytest.fixture
def do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., tuple[int, list[Finding]]]:
    """Does experiments, `folder` among them as given, over a report of an earlier lab; exit code and report."""
    file = tmp_path / "report.json"
    report.merge(file, [_found("disk", "disk"), _found("renamed", "removed"), _found("old", "folder")])

    def do(folder: Callable[[Lab], Iterator[Finding]], *names: str) -> tuple[int, list[Finding]]:
        others = {"folder": folder, "disk": lambda lab: iter([_found("full")])}
        monkeypatch.setattr("faults.__main__.EXPERIMENTS", others)
        return main(names, out=file, work=tmp_path / "lab"), report.read(file)

    return do


def test_an_experiment_that_breaks_off_has_failed_and_the_others_go_on(do: Callable) -> None:
    started: list[Process] = []

    def breaks(lab: Lab) -> Iterator[Finding]:
        """Finds something, leaves a process behind, and raises."""
        yield _found("early")
        started.append(lab.start("import time; time.sleep(60)", {}, script="timeit"))
        raise OSError("no | room\nat all")

    code, (removed, early, broke, full) = do(breaks, "disk", "folder")
    assert code == 1 and not started[0].runs
    assert (removed.fault, early) == ("renamed", _found("early", "folder")) and full == _found("full", "disk")
    assert broke == Finding("the experiment folder", 1, 1, False, "broke off: OSError: no | room", "folder")
    assert "| the experiment folder | 1 | 1 | FAILED | broke off: OSError: no / room |" in report.table([broke])


def test_a_whole_lab_forgets_what_is_not_done_any_more(do: Callable) -> None:
    assert do(lambda lab: iter([_found("new")])) == (0, [_found("new", "folder"), _found("full", "disk")])


def test_an_interrupted_lab_ends(do: Callable) -> None:
    def interrupted(lab: Lab) -> Iterator[Finding]:
        """As by a user."""
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        do(interrupted, "folder")
