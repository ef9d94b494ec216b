"""Manifests with faults of every kind: each costs its own row, or the file is refused with a place and a remedy."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from faults.checking import check
from faults.corpus.files import encoded
from faults.corpus.names import cases, lay
from faults.corpus.pictures import RGB
from faults.corpus.rows import FILES, JSON_ROWS, LINES, OK_FILE, TABLE_LINES, FileCase, RowCase, row
from faults.lab import Finding, Lab

_HEADER = "image_file,text"


def rows(lab: Lab) -> Iterator[Finding]:
    """Every row and every manifest of the corpus, by `check` and, where rows are faulty, by `train`."""
    folder = lab.place("rows")
    (folder / OK_FILE).write_bytes(encoded(RGB, "PNG"))
    wrong: list[str] = []
    lines, values = [*JSON_ROWS, *LINES], [case for case in JSON_ROWS if case.is_value]
    head = RowCase("", _HEADER)
    wrong += _misjudged(lab, folder / "rows.jsonl", b"\n".join(case.content for case in lines), lines, 1)
    wrong += _misjudged(lab, folder / "rows.json", b"[%b]" % b",\n".join(case.content for case in values), values, 1)
    table = b"\n".join(case.content for case in (head, *TABLE_LINES))
    wrong += _misjudged(lab, folder / "rows.csv", table, TABLE_LINES, 2)
    wrong += _unlisted(lab, folder / "rows.jsonl", lines)
    files = FILES[:: max(1, round(1 / lab.share))]
    wrong += [case.what for case in files if not _as_expected(lab, folder, case)]
    tries = len(lines) + len(values) + len(TABLE_LINES) + len(files) + 1
    kinds = len({case.kind for case in (*lines, *TABLE_LINES)} - {""})
    note = f"{tries - len(files) - 1} rows in three forms, faults of {kinds} kinds, and {len(files)} whole files, "
    note += "judged by check; train lists and counts the same" + _listed(wrong)
    yield Finding("rows and manifests with faults of every kind", tries, len(wrong), not wrong, note)


def names(lab: Lab) -> Iterator[Finding]:
    """Names of pictures by every spelling, with links, devices, pipes, sockets and folders behind them."""
    root = lay(lab.place("names"))
    listed = cases(root)
    manifest = root / "names.jsonl"
    manifest.write_text("".join(row(case.name) + "\n" for case in listed))
    checked = check(lab, manifest)
    wrong = [] if checked.exit_code == 0 else [f"exit {checked.exit_code}"]
    for number, case in enumerate(listed, 1):
        told = [fault.kind for fault in checked.faults.get(number, [])]
        if not (told[0] in case.kinds if len(told) == 1 else not told and not case.kinds):
            wrong.append(ascii(case.name[:60]))
    verdicts = Counter(case.kinds[0] if case.kinds else "read" for case in listed)
    note = ", ".join(f"{count} {kind}" for kind, count in verdicts.most_common()) + _listed(wrong)
    yield Finding("names by every spelling, links, devices, pipes, sockets", len(listed), len(wrong), not wrong, note)


def _misjudged(lab: Lab, manifest: Path, content: bytes, listed: Sequence[RowCase], first: int) -> list[str]:
    """Rows of a manifest that `check` does not judge as expected; the first of them has this number."""
    manifest.write_bytes(content)
    checked = check(lab, manifest)
    wrong = [] if checked.exit_code == 0 else [f"{manifest.name}: exit {checked.exit_code}"]
    for number, case in enumerate(listed, first):
        told = checked.faults.get(number, [])
        judged = {fault.kind for fault in told} == ({case.kind} if case.kind else set())
        named = any(
            case.says in fault.line and f"{manifest.name}, " in fault.line and "; " in fault.line for fault in told
        )
        if not judged or (case.kind and not named):
            wrong.append(f"{manifest.name}: {case.what}")
    return wrong


def _unlisted(lab: Lab, manifest: Path, listed: Sequence[RowCase]) -> list[str]:
    """Nothing, if a run lists the same faulty rows in its `faults.jsonl`, by the same kinds."""
    output = manifest.parent / "out"
    given = {"data_json_file": manifest, "data_root_path": manifest.parent, "max_fault_rate": 1.0, "max_train_steps": 1}
    code, _ = lab.run("train", lab.training(output, **given))
    faults = [json.loads(line) for line in (output / "faults.jsonl").read_text().splitlines()]
    found = {(fault["where"].split(" (")[0], fault["kind"]) for fault in faults}
    expected = {(f"{manifest.name}, line {number}", case.kind) for number, case in enumerate(listed, 1) if case.kind}
    return [] if code == 0 and found == expected else ["faults.jsonl"]


def _as_expected(lab: Lab, folder: Path, case: FileCase) -> bool:
    manifest = folder / case.name
    manifest.write_bytes(case.content)
    checked = check(lab, manifest)
    refused_well = case.exit_code != 2 or (checked.said.startswith("error: ") and str(manifest) in checked.said)
    return checked.exit_code == case.exit_code and refused_well and all(words in checked.said for words in case.says)


def _listed(wrong: Sequence[str]) -> str:
    return f"; not so: {', '.join(wrong[:8])}" if wrong else ""
