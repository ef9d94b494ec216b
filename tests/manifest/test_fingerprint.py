"""Rows are known again by a few kilobytes, which tell the one row that changed."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ip_adapter_trainer.manifest.fingerprint import SIDE, Digest, Fingerprint

ROWS = 3 * SIDE + 17


def of(rows: list[str]) -> Fingerprint:
    digest = Digest()
    for row in rows:
        digest.add(row.encode())
    return digest.fingerprint()


def rows(**changed: str) -> list[str]:
    return [changed.get(f"row_{number}", f"{number}.png") for number in range(ROWS)]


WHOLE = of(rows())


@pytest.mark.parametrize("number", [0, SIDE - 1, SIDE, 2 * SIDE + 5, ROWS - 1])
def test_the_one_row_that_changed_is_named(number: int) -> None:
    other = of(rows(**{f"row_{number}": f"{number}.pnh"}))
    assert other.sha256 != WHOLE.sha256
    assert WHOLE.changed_row(other) == number
    assert WHOLE.difference(other) == f"of {ROWS:,} rows one changed, row {number + 1:,}"


def test_several_are_bounded() -> None:
    other = of(rows(row_1030="a", row_1040="b", row_2100="c"))
    assert WHOLE.changed_row(other) is None
    assert WHOLE.difference(other) == "all that changed is among rows 1,025 to 3,072, 3 at least"


def test_rows_that_are_missing_or_more_are_counted() -> None:
    fewer = of(rows()[:1500] + rows()[1501:])
    assert WHOLE.difference(fewer) == f"there were {ROWS:,} rows and are {ROWS - 1:,}; " \
        f"all that changed is among rows 1,025 to {ROWS:,}"  # fmt: skip
    more = of([*rows(), "one more"])
    assert WHOLE.changed_row(more) is None and "3,090" in WHOLE.difference(more)


def test_rows_that_changed_places_are_told() -> None:
    swapped = rows()
    swapped[5], swapped[2 * SIDE + 5] = swapped[2 * SIDE + 5], swapped[5]
    assert WHOLE.difference(of(swapped)) == "all that changed is among rows 1 to 3,072, 2 at least"
    within = rows()
    within[5], within[6] = within[6], within[5]
    assert WHOLE.difference(of(within)) == f"of {ROWS:,} rows some changed places"


def test_it_survives_json() -> None:
    again = Fingerprint.from_json(json.loads(json.dumps(WHOLE.to_json())))
    assert (again.sha256, again.rows) == (WHOLE.sha256, WHOLE.rows)
    assert all(not len(np.atleast_1d(side)) for side in WHOLE.differing(again))
