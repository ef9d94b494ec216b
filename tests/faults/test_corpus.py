"""The lab's corpora of rows and names: the verdicts of the readers themselves, and of real commands on a small part."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from faults import paths, rows
from faults.corpus import names
from faults.corpus.rows import FILES, JSON_ROWS, LINES, OK, OK_FILE, TABLE_LINES, FileCase, RowCase
from faults.lab import Lab
from ip_adapter_trainer.core.errors import Problem
from ip_adapter_trainer.manifest.config import ReadConfig
from ip_adapter_trainer.manifest.manifest import Manifest, read_manifest
from ip_adapter_trainer.storage.files import safe_join

POSIX = pytest.mark.skipif(os.name != "posix", reason="links, pipes and sockets of POSIX")


def _read(file: Path, content: bytes) -> Manifest:
    file.write_bytes(content)
    return read_manifest(ReadConfig(data_json_file=str(file)))


def _demand(manifest: Manifest, case: RowCase, where: str) -> None:
    assert {fault.kind for fault in manifest.faults} == ({case.kind} if case.kind else set())
    assert len(manifest.rows) == (1 if case.kind else 2)
    assert not manifest.faults or any(case.says in str(fault) for fault in manifest.faults)
    assert all(fault.where == where and fault.remedy and str(fault).isprintable() for fault in manifest.faults)


@pytest.mark.parametrize("case", [*JSON_ROWS, *LINES], ids=lambda case: case.what)
def test_a_row_of_json_is_judged_as_expected(case: RowCase, tmp_path: Path) -> None:
    ok = OK.encode()
    _demand(_read(tmp_path / "a.jsonl", b"%b\n%b\n" % (ok, case.content)), case, "a.jsonl, line 2")
    if case.is_value:
        _demand(_read(tmp_path / "a.json", b"[%b,\n%b]" % (ok, case.content)), case, "a.json, element 2 (line 2)")


@pytest.mark.parametrize("case", TABLE_LINES, ids=lambda case: case.what)
def test_a_line_of_a_table_is_judged_as_expected(case: RowCase, tmp_path: Path) -> None:
    _demand(_read(tmp_path / "a.csv", b"image_file,text\nok.png,ok\n" + case.content), case, "a.csv, line 3")


@pytest.mark.parametrize("case", [case for case in FILES if case.exit_code == 2], ids=lambda case: case.what)
def test_a_manifest_is_refused_with_its_place_and_a_remedy(case: FileCase, tmp_path: Path) -> None:
    with pytest.raises(Problem) as caught:
        _read(tmp_path / case.name, case.content)
    assert caught.value.fault.where.startswith(str(tmp_path / case.name)) and caught.value.fault.remedy
    assert all(words in str(caught.value) for words in case.says)
    assert all(line.isprintable() for line in str(caught.value).splitlines())


@POSIX
def test_names_are_judged_as_expected_by_a_real_check(tmp_path: Path) -> None:
    (finding,) = rows.names(Lab(tmp_path))
    assert finding.passed, finding.note


@POSIX
def test_captions_are_judged_as_expected_and_none_is_read_from_outside(tmp_path: Path) -> None:
    folder = tmp_path / "root"
    folder.mkdir()
    cases = names.write_captions(folder)
    manifest = read_manifest(ReadConfig(data_json_file=str(folder)))
    told = {int(fault.where.split("picture ")[1].split()[0]): fault for fault in manifest.faults}
    for number, case in enumerate(cases, 1):
        kind = (told[number].kind,) if number in told else ()
        assert kind == case.kinds and (number not in told or str(told[number]).isprintable()), case.name
    assert not any("not to be read" in row.text for row in manifest.rows)
    assert all(manifest.where(row).isprintable() for row in range(len(manifest.rows)))
    outside = read_manifest(ReadConfig(data_json_file=str(folder), allow_outside_root=True))
    assert sum("not to be read" in row.text for row in outside.rows) == 2


@POSIX
def test_generated_names_do_not_get_out_of_a_real_check(tmp_path: Path) -> None:
    (finding,) = paths.paths(Lab(tmp_path, share=0.02))
    assert finding.passed and finding.tries == 200, finding.note


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return names.write_files(tmp_path_factory.mktemp("names"))


NAMES = st.lists(st.one_of(st.sampled_from(names.PIECES), st.text(max_size=4)), max_size=8).map("".join)


@POSIX
@settings(max_examples=500, deadline=None, derandomize=True)
@given(name=NAMES)
def test_any_name_stays_under_the_root_or_is_refused(root: Path, name: str) -> None:
    try:
        path = safe_join(root, name)
    except Problem as problem:
        assert problem.fault.remedy
    else:
        assert Path(os.path.realpath(path)).is_relative_to(root)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(content=st.binary(max_size=200), ending=st.sampled_from([".json", ".jsonl", ".csv"]))
def test_any_bytes_are_rows_faults_or_a_problem(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, ending: str
) -> None:
    folder = tmp_path_factory.getbasetemp()
    heads = {".json": b"[", ".jsonl": b'{"image_file": "%b"' % OK_FILE.encode(), ".csv": b"image_file,text\n"}
    try:
        manifest = _read(folder / f"any{ending}", heads[ending] + content)
    except Problem as problem:
        assert problem.fault.where and problem.fault.remedy
    else:
        assert manifest.entries >= 1 and all(str(fault).isprintable() for fault in manifest.faults)
