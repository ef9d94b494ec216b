"""Faults are counted by rows, written down once, and stop the run above the limit."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from ip_adapter_trainer.core.errors import DataProblem, Fault, Problem
from ip_adapter_trainer.manifest.faults import FILE_NAME, FaultLog, allowed_rows


def _fault(row: int, kind: str = "damaged") -> Fault:
    return Fault(kind, "it is broken", f"data.json, element {row}", "mend it")


@pytest.mark.parametrize(
    ("rows", "rate", "allowed"),
    [(1000, 0.01, 10), (10, 0.01, 1), (100, 0.29, 29), (10**6, 0.0, 0), (5, 1.0, 4), (1, 0.01, 0)],
)
def test_the_limit(rows: int, rate: float, allowed: int) -> None:
    assert allowed_rows(rows, rate) == allowed


def test_distinct_rows_count_and_are_written_once(tmp_path: Path) -> None:
    log = FaultLog(tmp_path / "run", 300, 0.01)
    log.add(())
    assert not (tmp_path / "run").exists()
    log.add([_fault(1), _fault(1), _fault(1, "unsafe_path")])
    log.add([_fault(1), _fault(2), _fault(3)])
    assert log.faulty_rows == 3 and log.by_kind == {"damaged": 3, "unsafe_path": 1}
    lines = (tmp_path / "run" / FILE_NAME).read_text().splitlines()
    assert len(lines) == 4 and json.loads(lines[0])["where"] == "data.json, element 1"
    with pytest.raises(DataProblem, match=r"4 of 300 rows are faulty, over the limit of 1\.00%") as caught:
        log.add([_fault(4)])
    assert (
        caught.value.exit_code == 3
        and "element 4" in caught.value.fault.where
        and FILE_NAME in caught.value.fault.remedy
    )


def test_rate_zero_stops_at_the_first(tmp_path: Path) -> None:
    with pytest.raises(DataProblem):
        FaultLog(tmp_path, 10**6, 0.0).add([_fault(1)])


def test_faults_that_a_disk_refused_are_written_when_it_takes_them_though_no_other_follows(tmp_path: Path) -> None:
    log, folder = FaultLog(tmp_path / "run", 300, 0.01), tmp_path / "run"
    folder.touch()  # in the way
    log.add([_fault(1), _fault(2)])
    folder.unlink()
    log.add(())
    lines = (folder / FILE_NAME).read_text().splitlines()
    assert [json.loads(line)["where"] for line in lines] == ["data.json, element 1", "data.json, element 2"]
    log.add(())
    assert len((folder / FILE_NAME).read_text().splitlines()) == 2


def test_a_resumed_run_counts_on(tmp_path: Path) -> None:
    FaultLog(tmp_path, 200, 0.01).add([_fault(1), _fault(2)])
    with (tmp_path / FILE_NAME).open("a") as file:
        file.write('{"kind": "dam')
    log = FaultLog(tmp_path, 200, 0.01)
    log.add([_fault(2)])
    assert log.faulty_rows == 2
    with pytest.raises(DataProblem):
        log.add([_fault(3)])


def test_what_follows_a_torn_line_is_not_lost(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text('{"kind": "dam')
    FaultLog(tmp_path, 200, 0.01).add([_fault(1)])
    FaultLog(tmp_path, 200, 0.01).add([_fault(2)])
    assert FaultLog(tmp_path, 200, 0.01).faulty_rows == 2


def test_names_of_strangers_are_one_bounded_line_and_the_same_when_read_again(tmp_path: Path) -> None:
    odd = Fault("missing_file", "what\n\x1b[2J\udcff", "data.json, element 1 (" + "\0" * 10**6 + ")", "\u202e")
    FaultLog(tmp_path, 200, 0.01).add([odd])
    log = FaultLog(tmp_path, 200, 0.01)
    log.add([odd])
    assert str(odd).isprintable() and len(str(odd)) < 1300
    assert log.faulty_rows == 1 and len((tmp_path / FILE_NAME).read_text().splitlines()) == 1


def test_processes_that_share_a_folder_count_together_and_write_each_fault_once(tmp_path: Path) -> None:
    first, second = (FaultLog(tmp_path, 300, 0.01) for _ in range(2))
    first.add([_fault(0)])
    second.add([_fault(0)], writes=False)
    first.add([_fault(1), _fault(2)])
    second.add([_fault(2)])
    assert [json.loads(line)["where"][-1] for line in (tmp_path / FILE_NAME).read_text().splitlines()] == list("012")
    with pytest.raises(DataProblem, match="4 of 300 rows are faulty"):
        second.add([_fault(3)])


@pytest.mark.parametrize(
    "line",
    [b"\xff", b'{"kind": [], "what": "", "where": "", "remedy": ""}', b"[" * 100_000, b"7", b'{"kind": "damaged"}'],
    ids=["bytes", "a_list", "deep", "a_number", "a_part"],
)
def test_damaged_lines_are_passed_over(tmp_path: Path, line: bytes) -> None:
    FaultLog(tmp_path, 200, 0.01).add([_fault(1)])
    with (tmp_path / FILE_NAME).open("ab") as file:
        file.write(line + b"\n")
    log = FaultLog(tmp_path, 200, 0.01)
    log.add([_fault(2)])
    assert log.faulty_rows == FaultLog(tmp_path, 200, 0.01).faulty_rows == 2


def test_what_is_no_file_of_these_rows_is_refused(tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    with path.open("wb") as file:
        file.truncate(10**9)
    with pytest.raises(Problem, match="more than the faults of 200 rows"):
        FaultLog(tmp_path, 200, 0.01)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(Problem, match="no regular file"):
        FaultLog(tmp_path, 200, 0.01)
