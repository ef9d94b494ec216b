"""Who reached what, how it is told, and that every lever pulls at something that is there."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.fewer_steps import LEVERS, Raced, race_table
from benchmarks.pocket_runs import TEXT_NOISE, Laid, Mark, Measure
from ip_adapter_trainer.config import compose
from ip_adapter_trainer.pocket import world

GOAL = Mark(1000, 200.0, 0.03, 0.001, 0.14, {"shape": 0.98, "colour": 0.67, "pattern": 0.88, "background": 0.95})


def scored(**scores: float) -> Mark:
    return replace(GOAL, step=300, seconds=60.0, scores=GOAL.scores | scores)


def test_every_image_attribute_and_the_gap_must_be_reached_and_the_text_may_miss_by_its_noise() -> None:
    assert scored().reaches(GOAL) and scored(shape=0.98 - TEXT_NOISE + 1e-9).reaches(GOAL)
    assert not scored(shape=0.9).reaches(GOAL)
    assert not scored(colour=0.66, pattern=1.0, background=1.0).reaches(GOAL)
    assert not replace(scored(), gap=0.029).reaches(GOAL)
    assert not replace(scored(), scores={}).reaches(GOAL), "no scores were drawn, as the gap was too small"


def test_the_table_has_a_row_for_each_seed_and_means_only_where_all_got_there() -> None:
    low = replace(scored(), step=250, gap=0.01, scores={})
    there, never = Raced("Muon 3e-3", 0, GOAL, [low, scored()]), Raced("Muon 3e-3", 1, GOAL, [low])
    assert there.reached == scored() and never.reached is None
    assert never.as_json()["steps"] is None and there.as_json()["steps"] == 300
    rows = race_table([there, never]).splitlines()
    assert "| 300 | 60 |" in rows[2] and "| 3.3 | 3.3 |" in rows[2] and "not reached" in rows[3] and len(rows) == 4
    assert race_table([there]).splitlines()[-1].startswith("| Muon 3e-3 | mean | 1000 | 200 |")
    assert len({row.count("|") for row in race_table([there, never]).splitlines()}) == 1


def test_levers_are_settings_of_train() -> None:
    known = compose("base", "sd").model_fields
    assert not {name for settings in LEVERS.values() for name in settings} - known.keys()


@pytest.mark.parametrize("held", [False, True])
def test_scored_pairs_are_all_seen_or_all_held_out(held: bool, tmp_path) -> None:
    pairs = Measure(Laid(tmp_path, 3), held=held).pairs
    for pair in pairs:
        wanted = replace(pair.reference, shape=pair.text_shape)
        assert world.held_out(pair.reference) is held and world.held_out(wanted) is held
        assert pair.text_shape != pair.reference.shape
    assert len({pair.reference for pair in pairs}) > 90
