"""Manifests with faults of every kind: each costs its own row, or the file is refused with a place and a remedy."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from faults.checking import Checked, check
from faults.corpus.files import encoded
from faults.corpus.names import NameCase, cases, write_captions, write_files
from faults.corpus.pictures import RGB
from faults.corpus.rows import FILES, JSON_ROWS, LINES, OK, OK_FILE, TABLE_LINES, FileCase, RowCase, row
from faults.lab import Finding, Lab
from faults.watch import seen

_HEADER = "image_file,text"
ENDLESS_MB, ENDLESS_LIMIT_MB = 64, 50
ENDLESS = {  # how each begins, what it goes on with, and the exit code
    "blank.json": ("", " ", 2), "word.json": ("", "x", 2), "broken.json": (f"[{OK},\n{{tru", "x", 2),
    "string.json": (f'[{OK},\n{{"image_file": "', "x", 2), "line.jsonl": (f"{OK}\n", "x", 0),
    "line.csv": (f"{_HEADER}\nok.png,", "x", 2), "quote.csv": (f'{_HEADER}\nok.png,"', "x", 2),
}  # fmt: skip


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
    root = write_files(lab.place("names"))
    listed = cases(root)
    manifest = root / "names.jsonl"
    manifest.write_text("".join(row(case.name) + "\n" for case in listed))
    wrong = _misnamed(check(lab, manifest), listed, 3)  # so many in turn that training would stop
    folder = lab.place("captions") / "root"
    folder.mkdir()
    captioned = write_captions(folder)
    wrong += _misnamed(check(lab, folder), captioned, 0)
    listed += captioned
    verdicts = Counter(case.kinds[0] if case.kinds else "read" for case in listed)
    note = ", ".join(f"{count} {kind}" for kind, count in verdicts.most_common()) + _listed(wrong)
    yield Finding("names by every spelling, links, devices, pipes, sockets", len(listed), len(wrong), not wrong, note)


def endless(lab: Lab) -> Iterator[Finding]:
    """Manifests of 64 MB without an end to a row: what a watched `check` holds, beside that of one row."""
    folder = lab.place("endless")
    (folder / OK_FILE).write_bytes(encoded(RGB, "PNG"))
    costs_mb: dict[str, float] = {}
    wrong = []
    for name, (head, more, exit_code) in {"one.jsonl": (OK, "", 0), **ENDLESS}.items():
        with (folder / name).open("w") as file:
            file.write(head)
            for _ in range(ENDLESS_MB):
                file.write(more * 2**20)
        checked = check(lab, folder / name, watched=True)
        (peak,) = (event["peak_bytes"] for event in seen(lab.folder, checked.pid) if "peak_bytes" in event)
        costs_mb[name] = peak / 2**20 - costs_mb.get("one.jsonl", 0)
        if checked.exit_code != exit_code or (name in ENDLESS and costs_mb[name] >= ENDLESS_LIMIT_MB):
            wrong.append(f"{name}: exit {checked.exit_code}, {costs_mb[name]:.0f} MB")
    most = max(costs_mb[name] for name in ENDLESS)
    note = f"refused or a fault; at most {most:.1f} MB over a check of one row (limit {ENDLESS_LIMIT_MB} MB)" + _listed(
        wrong
    )
    yield Finding(f"manifests of {ENDLESS_MB} MB that do not end", len(ENDLESS), len(wrong), not wrong, note)


def _misnamed(checked: Checked, listed: Sequence[NameCase], exit_code: int) -> list[str]:
    """Names whose row was not told as one of its faults, in one printable line, or as none."""
    wrong = [] if checked.exit_code == exit_code else [f"exit {checked.exit_code}"]
    for number, case in enumerate(listed, 1):
        told = checked.faults.get(number, [])
        if not (
            told[0].kind in case.kinds and told[0].line.isprintable() if len(told) == 1 else not told and not case.kinds
        ):
            wrong.append(ascii(case.name[:60]))
    return wrong


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
