"""Notices from reading a folder that are no faults: above all of files that were passed over."""

from __future__ import annotations

from ip_adapter_trainer.core.redact import one_line

_NAMES = 3  # shown of each kind


class Noticed:
    """Counts by kind, with the first names of each."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.first: dict[str, list[str]] = {}

    def add(self, kind: str, name: str) -> None:
        """Count one file or folder."""
        self.counts[kind] = self.counts.get(kind, 0) + 1
        names = self.first.setdefault(kind, [])
        if len(names) < _NAMES:
            names.append(name)

    def named(self) -> dict[str, int]:
        """Return the counts by kind, the first names with each kind."""
        more = {kind: ", ..." * (count > _NAMES) for kind, count in self.counts.items()}
        return {one_line(f"{k}: {', '.join(self.first[k])}{more[k]}"): count for k, count in self.counts.items()}

    def in_short(self) -> str:
        """Return the counts on one line; empty if there are none."""
        return "; ".join(f"{kind}: {count}" for kind, count in self.counts.items())
