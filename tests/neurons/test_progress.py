"""How far something long is: rates and times from moments handed in, told by the loop's time."""

import asyncio

import pytest

from neurons.progress import Meter, Pace, Standing, followed
from tests.virtual import run

MB = 1_000_000


def test_what_was_there_before_says_nothing_about_the_rate() -> None:
    standing = Pace(100.0, 40 * MB).at(110.0, 60 * MB, 100 * MB)
    assert (standing.rate, standing.left) == (2 * MB, 20.0)
    assert standing.text() == "60.0% of 100.0 MB, 2.0 MB/s, 20 s left"


def test_nothing_is_known_at_the_first_moment() -> None:
    standing = Pace(5.0).at(5.0, 0, 10 * MB)
    assert (standing.rate, standing.left) == (None, None)
    assert standing.text() == "0.0% of 10.0 MB"


def test_a_stall_brings_the_rate_to_nothing_within_the_window() -> None:
    pace = Pace(0.0, window=60.0)
    standings = [pace.at(float(now), min(now, 100) * MB, 1_000 * MB) for now in range(10, 171, 10)]
    rates = [standing.rate for standing in standings]
    assert rates[:10] == [MB] * 10
    assert rates[12] == pytest.approx(MB / 2)
    assert rates[-1] == 0.0
    assert standings[-1].left is None
    assert standings[-1].text() == "10.0% of 1.0 GB, 0 B/s"


def test_the_end_is_told_with_the_mean_of_what_came() -> None:
    assert Pace(0.0, 50 * MB).at(25.0, 100 * MB, 100 * MB).text() == "100.0 MB in 25 s, 2.0 MB/s"
    assert Pace(0.0, 100 * MB).at(0.0, 100 * MB, 100 * MB).text() == "100.0 MB in 0 ms"


def test_it_is_told_every_so_often_and_at_the_end() -> None:
    told: list[tuple[float, float]] = []

    async def work() -> None:
        meter = Meter()
        async with followed(meter, lambda standing: told.append((standing.seconds, standing.done)), every=10.0):
            await asyncio.sleep(15.0)  # nothing is known of it yet
            meter.at(3, 8)
            for done in range(4, 9):
                await asyncio.sleep(4.0)
                meter.at(done, 8)

    run(work())
    assert told == [(20.0, 4), (30.0, 6), (35.0, 8)]


def test_what_fails_is_not_told_as_ended() -> None:
    told: list[Standing] = []

    async def work() -> None:
        async with followed(Meter(total=8), told.append, every=10.0):
            await asyncio.sleep(15.0)
            raise ConnectionError

    with pytest.raises(ConnectionError):
        run(work())
    assert [standing.seconds for standing in told] == [10.0]
