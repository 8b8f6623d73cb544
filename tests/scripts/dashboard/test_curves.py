"""Series stay short and lose nothing but detail."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scripts.dashboard.curves import Curve, Rate


@given(losses=st.lists(st.floats(0.0, 10.0), min_size=1, max_size=300), limit=st.integers(2, 9))
def test_a_curve_keeps_its_mean_and_its_end(losses: list[float], limit: int) -> None:
    curve = Curve(limit=limit)
    for index, loss in enumerate(losses):
        curve.add(float(index), index + 1, loss)
        assert len(curve.points) <= limit
    assert sum(point.count for point in curve.points) == len(losses)
    assert sum(point.sum for point in curve.points) == pytest.approx(sum(losses))
    assert curve.points[-1].done == len(losses)
    assert all(point.count == curve.width for point in curve.points[:-1])


def test_a_clock_that_is_behind_does_not_bend_a_curve_back() -> None:
    curve = Curve()
    for time in (5.0, 4.9, 6.0):
        curve.add(time, len(curve.points) + 1, 1.0)
    assert [point.time for point in curve.points] == [5.0, 5.0, 6.0]


@given(gaps=st.lists(st.floats(0.0, 50.0), min_size=1, max_size=200), limit=st.integers(2, 9))
def test_a_rate_counts_everything_once(gaps: list[float], limit: int) -> None:
    rate, time = Rate(limit=limit), 100.0
    for gap in gaps:
        time += gap
        rate.add(time)
        assert len(rate.counts) <= limit
    assert sum(rate.counts) == len(gaps)
    ends = [end for end, _ in rate.whole(float("inf"))]
    assert ends == sorted(ends)
    assert ends[-1] >= time
    assert all(end <= time for end, _ in rate.whole(time))


def test_nothing_has_no_rate() -> None:
    assert Rate().whole(1.0) == []
