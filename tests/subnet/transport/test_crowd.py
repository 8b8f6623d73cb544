"""Strangers at the door: bounded in number and in how fast they come, at nobody else's cost."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from subnet.transport.crowd import SOURCES, Crowd, source_of


def test_an_address_has_its_burst_and_then_its_rate() -> None:
    crowd: Crowd[int] = Crowd(burst=5, rate=10.0)
    assert [crowd.may_enter("a", 0.0) for _ in range(8)] == [True] * 5 + [False] * 3
    assert crowd.may_enter("b", 0.0), "another address"
    assert [crowd.may_enter("a", 0.1) for _ in range(3)] == [True, False, False]
    assert sum(crowd.may_enter("a", 0.1 + tick / 1000) for tick in range(10_000)) in (99, 100)
    assert [crowd.may_enter("a", 60.0) for _ in range(8)] == [True] * 5 + [False] * 3


def test_addresses_are_forgotten_before_they_fill_the_memory() -> None:
    crowd: Crowd[int] = Crowd(burst=1, rate=1.0)
    for second in range(3):
        for number in range(SOURCES):
            crowd.may_enter(f"{second}.{number}", 10.0 * second)
    assert len(crowd._due) <= SOURCES
    for number in range(3 * SOURCES):
        crowd.may_enter(str(number), 100.0)
    assert len(crowd._due) <= SOURCES


def test_who_comes_in_crowds_makes_room() -> None:
    crowd: Crowd[str] = Crowd(strangers=4)
    assert [crowd.enter(who, source) for who, source in [("a1", "a"), ("b1", "b"), ("b2", "b"), ("c1", "c")]] == [
        None
    ] * 4
    assert crowd.enter("d1", "d") == "b1", "the oldest of the address that has most"
    crowd.leave("a1")
    assert crowd.enter("e1", "e") is None
    crowd.leave("a1")
    crowd.leave("never came")
    assert len(crowd) == 4


@given(
    st.lists(st.tuples(st.integers(0, 30), st.sampled_from("abc"), st.booleans()), max_size=80),
    st.integers(1, 6),
)
def test_there_are_never_more_than_there_may_be(moves: Sequence[tuple[int, str, bool]], most: int) -> None:
    crowd: Crowd[int] = Crowd(strangers=most)
    here: dict[int, str] = {}
    for who, source, enters in moves:
        if enters and who not in here:
            gone = crowd.enter(who, source)
            if gone is not None:
                counts = [list(here.values()).count(name) for name in here.values()]
                assert list(here.values()).count(here.pop(gone)) == max(counts)
            here[who] = source
        elif not enters:
            crowd.leave(who)
            here.pop(who, None)
        assert len(crowd) == len(here) <= most


@pytest.mark.parametrize(
    ("address", "source"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8::1", "2001:db8::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
    ],
)
def test_a_machine_is_one_address(address: str, source: str) -> None:
    assert source_of(address) == source
