"""A small part of the lab: resumed as another run, and numbers that are not finite."""

from __future__ import annotations

from pathlib import Path

from faults import changes, numbers
from faults.lab import Lab


def test_the_one_row_that_changed_is_named(tmp_path: Path) -> None:
    (finding,) = changes.one_in_a_million(Lab(tmp_path, share=1e-4))
    assert finding.lost == 0 and "of 100 captions: refused, row 67 named" in finding.note.replace("one character ", "")


def test_a_nan_pixel_trains_nothing(tmp_path: Path) -> None:
    finding = next(numbers.not_finite(Lab(tmp_path, share=0.01)))
    assert finding.passed, finding.note
