"""Rounds, merges and churn against hand counts and a drawing of lots."""

from __future__ import annotations

import random

import pytest

from subnet.swarm.codec import codec_of
from subnet.swarm.downtime import (
    Churn,
    DowntimeError,
    Rounds,
    butterfly_seconds,
    gather_seconds,
    pace_kept,
    store_seconds,
)

_UP, _DOWN = 856e6, 1322e6


def test_a_serial_merge_stops_training_and_an_overlapped_one_does_not() -> None:
    serial = Rounds(length=3600, held_back=0, merge=600, overlapped=False)
    assert serial.merge_share == pytest.approx(1 / 7)
    assert Rounds(length=3600, held_back=0, merge=600, overlapped=True).merge_share == 0
    assert Rounds(length=3600, held_back=0, merge=600, overlapped=True, pause=36).merge_share == pytest.approx(0.01)


def test_a_round_ends_empty_and_begins_empty() -> None:
    """It fills for 30 s; what leaves 1.75 flights of 40 s before the close is the last, and is back after one."""
    rounds = Rounds(length=1440, held_back=0.75, merge=3, overlapped=True, last_step=24)
    assert rounds.ends_share(30, 40) == pytest.approx((30 + 30 + 24) / 1440)


def test_the_published_merge_takes_what_its_code_takes() -> None:
    # facts: 116 + 151 + 50 + 155 + 75 s for 12.45 GB and three replicas.
    assert store_seconds(12.45e9, replicas=3, up=_UP, down=_DOWN) == pytest.approx(547, abs=2)


def test_a_merge_of_ours_takes_its_payloads() -> None:
    topk = codec_of("topk2bit")
    size = topk.payload_bytes(6_480_000_000)
    assert gather_seconds(topk, 6_480_000_000, replicas=3, up=_UP, down=_DOWN) == pytest.approx(16 * size / _UP)
    bf16 = codec_of("bf16")
    assert butterfly_seconds(bf16, 1_000_000, replicas=3, up=8e6, down=9e6) == pytest.approx(2 * 5 / 3, rel=1e-3)
    assert butterfly_seconds(bf16, 1_000_000, replicas=1, up=8e6, down=9e6) == 0


def test_churn_is_a_share_of_time() -> None:
    churn = Churn(rate=0.1, absence=3600)
    assert churn.away == pytest.approx(0.1 / 1.1)
    assert churn.unmerged_share(7200) == pytest.approx(0.1)


def test_one_absent_replica_of_three_costs_a_third() -> None:
    # Nearly never two: sixteen stages of three lose about 48 · away / 3.
    assert 1 - pace_kept([3.0] * 16, [3] * 16, 1e-4) == pytest.approx(48e-4 / 3, rel=0.01)
    assert pace_kept([3.0] * 16, [3] * 16, 0) == 1
    # A stage with slack may lose a replica for nothing.
    assert 1 - pace_kept([3.0, 9.0], [3, 3], 1e-4) == pytest.approx(1e-4, rel=0.01)


def test_the_expected_pace_is_the_mean_of_drawn_lots() -> None:
    rates, replicas, away = [3.0, 4.0, 5.0, 3.5], [3, 2, 5, 3], 0.2
    chance = random.Random(1)  # noqa: S311 - no secret
    draws = 20_000
    total = sum(
        min(rate * sum(chance.random() >= away for _ in range(n)) / n for rate, n in zip(rates, replicas, strict=True))
        for _ in range(draws)
    )
    # The pace is that of the slowest stage with everybody there at most.
    capped = pace_kept(rates, replicas, away) * min(rates)
    assert capped == pytest.approx(total / draws, rel=0.02)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Rounds(length=0, held_back=0, merge=1, overlapped=False), "a round is 0 s"),
        (lambda: Rounds(length=60, held_back=0, merge=90, overlapped=True), "a merge takes 90 s, a round 60 s"),
        (
            lambda: Rounds(length=60, held_back=1, merge=1, overlapped=True).ends_share(20, 40),
            "a round of 60 s is over",
        ),
        (lambda: Churn(rate=-1, absence=1), "-1 departures per replica"),
    ],
)
def test_what_is_no_run_is_refused(make: object, words: str) -> None:
    with pytest.raises(DowntimeError, match=words):
        make()  # type: ignore[operator]
