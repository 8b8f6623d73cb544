"""When a head expects a microbatch back."""

from __future__ import annotations

import pytest

from neurons.flights import RECENT, Flights


def test_nothing_is_known_before_the_first() -> None:
    flights = Flights()
    flights.begin(1.0)
    assert flights.expected(0.0, []) == 0.0
    assert not flights.measured


def test_a_full_pipeline_makes_the_next_one_wait_for_all_in_the_air() -> None:
    """Twelve leave at once through a stage that takes one second each: whoever leaves after the third is fourth of
    what is left, not as fast as the third."""
    flights = Flights()
    flights.begin(1.0)
    for _ in range(12):
        flights.leave(0.0)
    for second in (1.0, 2.0, 3.0):
        flights.land(second)
    assert flights.expected(3.0, [0.0] * 9) == pytest.approx(10.0)


def test_a_pipeline_that_is_not_full_takes_as_long_as_the_slowest() -> None:
    flights = Flights()
    flights.begin(1.0)
    flights.leave(0.0)
    for _ in range(100):
        flights.land(2.0)
    flights.land(3.0)
    assert flights.expected(60.0, [59.0]) == 3.0
    for _ in range(RECENT):
        flights.land(2.0)
    assert flights.expected(60.0, [59.0]) == 2.0


def test_one_that_is_not_back_counts_as_long_as_it_is_away() -> None:
    flights = Flights()
    flights.begin(1.0)
    flights.leave(0.0)
    flights.land(0.5)
    assert flights.expected(9.0, [1.0]) >= 8.0


def test_fewer_replicas_make_flights_longer_until_one_is_back() -> None:
    flights = Flights()
    flights.begin(4 / 3)
    flights.land(3.0)
    flights.begin(4.0)
    assert flights.expected(0.0, []) == pytest.approx(9.0)
    flights.leave(0.0)
    flights.land(2.0)
    assert flights.slowest == 2.0
    flights.begin(1.0)
    assert flights.expected(0.0, []) == 2.0  # more replicas promise nothing
