"""Versioned state: reads at a block, transactions, bounded history; and the SCALE helpers beneath it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from subnet.localchain.codec import Codec
from subnet.localchain.metadata import compact, read_compact
from subnet.localchain.state import History, Snapshot, StateDiscarded, Working


@pytest.fixture(scope="module")
def codec() -> Codec:
    return Codec(slot_ms=100)


@given(st.integers(0, 2**64 - 1))
def test_compact_integers_round_trip(value: int) -> None:
    data = compact(value)
    assert read_compact(data, 0) == (value, len(data))
    with pytest.raises(ValueError, match="compact integer"):
        read_compact(data[:-1], 0)


@given(st.lists(st.dictionaries(st.sampled_from([b"a", b"ab", b"b"]), st.none() | st.binary(max_size=3)), max_size=80))
def test_history_reads_every_kept_block_as_it_was(blocks: list[dict[bytes, bytes | None]]) -> None:
    history = History(keep=20)
    states: list[dict[bytes, bytes]] = []
    current: dict[bytes, bytes] = {}
    for number, changes in enumerate(blocks):
        history.commit(number, changes)
        current = {key: value for key, value in {**current, **changes}.items() if value is not None}
        states.append(current)
    for number in range(history.oldest, len(blocks)):
        assert {key: history.get(key, number) for key in states[number]} == states[number]
        assert list(history.keys(b"a", number)) == sorted(key for key in states[number] if key.startswith(b"a"))


def test_history_is_bounded(codec: Codec) -> None:
    history = History(keep=50)
    for number in range(2_000):
        history.commit(number, {b"key": number.to_bytes(4, "little")})
    assert len(history._versions[b"key"]) < 2 * 50
    with pytest.raises(StateDiscarded):
        Snapshot(codec, history, 1_900)


def test_keys_page_strictly_after_a_key() -> None:
    history = History(keep=10)
    history.commit(0, {b"p1": b"x", b"p2": b"x", b"p3": b"x", b"q": b"x"})
    assert list(history.keys(b"p", 0, after=b"p1")) == [b"p2", b"p3"]


def test_a_failed_transaction_leaves_nothing(codec: Codec) -> None:
    state = Working(codec, History(keep=10))
    state.put("SubtensorModule.Tempo", (9,), 7)

    def fail() -> None:
        with state.transaction():
            state.put("SubtensorModule.Tempo", (9,), 8)
            with state.transaction():
                state.put("SubtensorModule.Burn", (9,), 1)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert state.number("SubtensorModule.Tempo", 9) == 7
    assert not state.exists("SubtensorModule.Burn", 9)


def test_a_missing_value_reads_as_the_default_of_the_metadata(codec: Codec) -> None:
    state = Working(codec, History(keep=10))
    assert state.number("SubtensorModule.Kappa", 9) == 32_767
    assert state.account("SubtensorModule.Owner", "5GrwvaEF5zXb26Fz9rcQpDWS57CtERHpNehXCPcNoHGKutQY") is None
    assert state.struct("SubtensorModule.Axons", 9, "5GrwvaEF5zXb26Fz9rcQpDWS57CtERHpNehXCPcNoHGKutQY") is None
    with pytest.raises(KeyError):
        state.value("SubtensorModule.NoSuchItem")


def test_the_metadata_carries_the_block_time_and_the_item_that_the_sdk_asks_for(codec: Codec) -> None:
    assert codec._rt.constant("Aura", "SlotDuration") == 100
    assert Working(codec, History(keep=10)).value("SubtensorModule.SubnetEpochConsensus", 9) == 0
