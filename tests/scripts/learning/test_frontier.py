"""What a boundary's bytes are worth in time."""

import math
from dataclasses import replace

import pytest

from scripts.bench.learning.frontier import frontier, frontier_table, slope
from scripts.bench.learning.rows import Row
from scripts.bench.learning.tables import summaries
from scripts.bench.learning.training import Curve
from scripts.cli import plan_options

CONTROL, T16 = Row(form="none+"), Row(form="t", ratio=16)


def _curve(final: float) -> Curve:
    return Curve(losses=((100, final),), parameters=1_000_000, seconds=1.0)


RESULTS = {
    CONTROL: _curve(3.5),
    replace(CONTROL, steps=200): _curve(3.5 + 0.3 * math.log(2)),
    replace(CONTROL, steps=800): _curve(3.5 - 0.3 * math.log(2)),
    T16: _curve(3.5),
    replace(T16, ratio=64): _curve(3.5 + 0.3 * math.log(1.25)),
    replace(T16, ratio=64, boundaries=7): _curve(9.0),
}


def test_the_slope_is_of_the_shortest_and_the_longest_run() -> None:
    found = summaries(RESULTS)
    assert slope(found, CONTROL) == pytest.approx(0.3)
    assert slope(found, T16) is None


def test_time_to_equal_loss_weighs_tokens_against_bytes() -> None:
    points = frontier(RESULTS, plan_options({}), [("20mbit", "20mbit"), ("856mbit", "1322mbit")], T16)
    assert [(point.link, point.ratio) for point in points] == [
        (link, ratio) for link in ("20mbit", "856mbit") for ratio in (1, 16, 64)
    ]
    assert [point.needed for point in points[1:3]] == pytest.approx([1.0, 1.25])
    slow, fast = points[1:3], points[4:]
    assert slow[1].seconds < 0.5 * slow[0].seconds, (
        "where the link binds, a quarter of the bytes is worth a quarter more"
    )
    assert fast[1].seconds == pytest.approx(1.25 * fast[0].seconds, rel=0.02), "where it does not, it is a loss"
    lines = frontier_table(points)
    assert lines[0] == "| link | 1x | 16x | 64x |"
    assert lines[2].startswith("| 20mbit | does not fit | ")
    assert lines[2].endswith("tokens/s, 1.00 |")
    assert lines[3].endswith(", 1.25 |")


def test_without_runs_of_other_lengths_there_is_no_frontier() -> None:
    alone = {row: curve for row, curve in RESULTS.items() if row.steps == CONTROL.steps}
    assert frontier(alone, plan_options({}), [("20mbit", "20mbit")], T16) == []
