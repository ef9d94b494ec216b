"""Generated names of pictures, tried for one that leads out of the root or onto the network."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from faults.checking import check
from faults.corpus.names import cases, spelled, write_files
from faults.corpus.rows import row
from faults.lab import Finding, Lab
from faults.watch import seen
from ip_adapter_trainer.core.errors import Problem
from ip_adapter_trainer.storage.files import safe_join

STRINGS = 10_000


def paths(lab: Lab) -> Iterator[Finding]:
    """Names mixed of every spelling, resolved, and as rows of a manifest that a watched `check` reads."""
    root = write_files(lab.place("paths"))
    names = list(spelled(root, lab.tries(STRINGS)))
    taken = [path for name in names if (path := _joined(root, name)) is not None]
    escapes = [str(path) for path in taken if not path.resolve().is_relative_to(root)]
    code, read, outside = _watched(lab, root, names)
    escapes += outside
    known = [case.name for case in cases(root)]
    _, _, seen_outside = _watched(lab, root, known, allow_outside_root=True)  # or the watch would see nothing
    good = code == 3 and read > 0 and not escapes and len(seen_outside) > 1
    note = f"{len(taken):,} taken, all of them under the root; a check of the same rows opened {read} files there, "
    note += (
        f"none of the decoys, and asked for no address; with --allow_outside_root it opened {len(seen_outside)} decoys"
    )
    note += f"; not so: exit {code}, {', '.join(map(ascii, escapes[:5]))}" if not good else ""
    yield Finding("names that lead out of the root or onto the network", len(names), len(escapes), good, note)


def _watched(lab: Lab, root: Path, names: Iterable[str], **settings: Any) -> tuple[int, int, list[str]]:
    """A check of rows with these names: its exit code, files opened under the root, and what it reached outside."""
    manifest = root / "names.jsonl"
    manifest.write_text("".join(row(name, "", prompt_image_file=name) + "\n" for name in names))
    checked = check(lab, manifest, watched=True, **settings)
    events = seen(lab.folder, checked.pid)
    opened = {Path(event["opened"]) for event in events if "opened" in event}
    inside = [path for path in opened if path.is_relative_to(root) and path != manifest]
    asked = [f"asked: {event['asked']}" for event in events if "asked" in event]
    return checked.exit_code, len(inside), [*(str(path) for path in opened if _is_a_decoy(path, root)), *asked]


def _joined(root: Path, name: str) -> Path | None:
    try:
        return safe_join(root, name)
    except Problem:
        return None


def _is_a_decoy(path: Path, root: Path) -> bool:
    """Whether only a row's name can have led there: beside the root, or where links in the root point."""
    beside = path.is_relative_to(root.parent) and not path.is_relative_to(root)
    return beside or str(path) in ("/etc/passwd", "/dev/zero") or path.name == "environ"
