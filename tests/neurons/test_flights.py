"""When a head expects a microbatch back."""

from __future__ import annotations

import pytest

from neurons.flights import DRAIN_MARGIN, DRAIN_SLACK, RECENT, Flight, Flights


def begun() -> Flights:
    flights = Flights()
    flights.begin(1.0)
    return flights


def leave(flights: Flights, count: int, *, at: float = 0.0) -> list[Flight]:
    return [flights.leave(at, number) for number in range(count)]


def test_nothing_is_known_before_the_first() -> None:
    flights = begun()
    assert flights.expected(0.0, []) == 0.0
    assert not flights.measured


def test_a_full_pipeline_makes_the_next_one_wait_for_all_in_the_air() -> None:
    """Twelve leave at once through a stage that takes one second each: whoever leaves after the third is tenth of what
    is left, not as fast as the third."""
    flights = begun()
    left = leave(flights, 12)
    for second, departure in enumerate(left[:3], start=1):
        flights.land(float(second), departure)
    assert flights.expected(3.0, left[3:]) == pytest.approx(10.0)


def test_a_pipeline_that_is_not_full_takes_as_long_as_the_slowest() -> None:
    flights = begun()
    (one,) = leave(flights, 1)
    for _ in range(100):
        flights.land(2.0, one)
    flights.land(3.0, one)
    in_air = [Flight(59.0, 1)]
    assert flights.expected(60.0, in_air) == 3.0
    for _ in range(RECENT):
        flights.land(2.0, one)
    assert flights.expected(60.0, in_air) == 2.0


def test_fewer_in_the_air_are_back_sooner_but_not_sooner_than_one_can_cross() -> None:
    flights = begun()
    flights.leave(0.0, 0)
    quick, *_, slow = leave(flights, 8)
    for _ in range(RECENT - 1):
        flights.land(8.0, slow)
    flights.land(1.5, quick)
    in_air = [Flight(39.0, 8)] * 7
    assert flights.expected(40.0, in_air) == pytest.approx(40.0)  # 8 x 40 s / 8 landed: what the round shows
    for _ in range(32):
        flights.land(8.0, slow)
    flights.land(1.5, quick)
    assert flights.expected(40.0, in_air) == pytest.approx(8.0)
    assert flights.expected(40.0, in_air[:3]) == pytest.approx(4.0)
    assert flights.expected(40.0, []) == pytest.approx(1.5)


def test_one_that_is_not_back_counts_as_long_as_it_is_away() -> None:
    flights = begun()
    (one,) = leave(flights, 1)
    flights.land(0.5, one)
    assert flights.expected(9.0, [Flight(1.0, 5)]) >= 8.0


def test_one_that_is_away_no_longer_than_others_were_counts_by_how_many_it_waits_for() -> None:
    flights = begun()
    leave(flights, 1)
    for _ in range(60):
        flights.land(8.0, Flight(0.0, 8))
    assert flights.expected(40.0, [Flight(33.0, 8)]) == pytest.approx(8.0)  # the quickest took so long
    flights.land(1.0, Flight(39.0, 1))
    assert flights.expected(40.0, [Flight(33.0, 8)]) == pytest.approx(2.0)


def test_fewer_replicas_make_flights_longer_until_one_is_back() -> None:
    flights = Flights()
    flights.begin(4 / 3)
    flights.land(3.0, Flight(0.0, 1))
    flights.begin(4.0)
    assert flights.expected(0.0, []) == pytest.approx(9.0)
    (one,) = leave(flights, 1)
    flights.land(2.0, one)
    assert flights.slowest == 2.0
    flights.begin(1.0)
    assert flights.expected(0.0, []) == 2.0  # more replicas promise nothing


def test_the_last_one_leaves_with_time_to_spare_that_a_usual_flight_measures() -> None:
    flights = begun()
    flights.leave(0.0, 0)
    for _ in range(60):
        flights.land(8.0, Flight(0.0, 8))
    for _ in range(RECENT):
        flights.land(1.0, Flight(0.0, 1))
    usual = (60 * 8.0 + RECENT) / (60 + RECENT)
    needed = DRAIN_MARGIN * 1.0 + DRAIN_SLACK * usual
    assert flights.returns(40.0, [], closing_at=40.0 + needed + 0.01, probe_until=0.0)
    assert not flights.returns(40.0, [], closing_at=40.0 + needed - 0.01, probe_until=0.0)
