"""The courier asks the right ones, in bounds, and believes nobody; the desk gives what it has."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from neurons.exchange import CALLS_PER_HOLDER, LEAVES, PIECES, SHARDS, Courier, Desk, Leaves
from neurons.terms import Layout
from subnet.swarm.merge import Source
from subnet.transport.errors import Unavailable, Unreachable
from tests.neurons.stage import virtually

NAMES = ("a", "b", "c", "d")
EVIDENCE = b"e" * 32


def desk_of(hotkey: str, pieces: int = 3) -> Desk:
    return Desk(hotkey, [f"{hotkey}{index}".encode() * 8 for index in range(pieces)], evidence=EVIDENCE)


class Peers:
    """Everybody's desk, a second away; counts calls, and how many were under way at once per holder."""

    def __init__(self, *names: str, pieces: int = 3) -> None:
        self.desks = {name: desk_of(name, pieces) for name in names}
        self.calls: Counter[str] = Counter()
        self.busy: Counter[str] = Counter()
        self.most: Counter[str] = Counter()
        self.hanging: set[str] = set()
        self.forging: set[str] = set()

    async def _reach(self, holder: str) -> Desk:
        self.calls[holder] += 1
        self.busy[holder] += 1
        self.most[holder] = max(self.most[holder], self.busy[holder])
        await asyncio.sleep(30 if holder in self.hanging else 1)
        self.busy[holder] -= 1
        if holder in self.hanging:
            raise Unreachable(f"{holder} does not answer")
        return self.desks[holder]

    async def leaves(self, holder: str, source: str, pieces: int) -> Leaves:
        hashes, evidence = (await self._reach(holder)).leaves(source)
        assert len(hashes) == pieces
        return hashes, evidence

    async def piece(self, holder: str, source: str, index: int, size: int) -> bytes:
        piece = (await self._reach(holder)).piece(source, index)
        return bytes(size) if holder in self.forging else piece

    async def merged(self, holder: str, shard: int, index: int, size: int) -> bytes:
        piece = (await self._reach(holder)).merged(shard, index)
        assert len(piece) == size
        return piece


def source_of(peers: Peers, hotkey: str) -> Source:
    return Source(NAMES.index(hotkey), hotkey, peers.desks[hotkey].root, 1)


async def fetch_all(courier: Courier, source: Source, pieces: int, *, turns: int | None = None) -> list[bytes]:
    leaves, _ = await courier.leaves(source, pieces, turns=turns)
    return await asyncio.gather(
        *(courier.piece(source, leaves[index], index, 16, turns=turns) for index in range(pieces))
    )


def test_a_source_is_asked_first_and_no_more_than_its_calls_at_once() -> None:
    peers = Peers(*NAMES, pieces=20)
    courier = Courier(peers, peers.desks["a"], NAMES)

    async def twice() -> list[bytes]:
        both = await asyncio.gather(*(fetch_all(courier, source_of(peers, "c"), 20) for _ in range(2)))
        return both[0]

    pieces = virtually(twice())
    assert pieces == [peers.desks["c"].piece_of("c", index) for index in range(20)]
    assert peers.calls == {"c": 21}
    assert peers.most["c"] == CALLS_PER_HOLDER
    assert courier.received == {LEAVES: 20 * 32 + 32, PIECES: sum(map(len, pieces))}
    assert peers.desks["c"].sent == courier.received


def test_who_hangs_is_passed_over_and_a_relay_serves() -> None:
    peers = Peers(*NAMES)
    source = source_of(peers, "c")
    relay = peers.desks["b"]
    virtually(fetch_all(Courier(peers, relay, NAMES), source, 3))
    peers.hanging.add("c")
    courier = Courier(peers, peers.desks["a"], NAMES)

    async def timed() -> float:
        await fetch_all(courier, source, 3)
        return asyncio.get_running_loop().time()

    assert virtually(timed()) < 35  # one silence, not one per piece
    assert not courier.forged


def test_who_forges_is_named_and_never_asked_again() -> None:
    peers = Peers(*NAMES)
    source = source_of(peers, "c")
    virtually(fetch_all(Courier(peers, peers.desks["d"], NAMES), source, 3))
    peers.forging.add("c")
    courier = Courier(peers, peers.desks["a"], NAMES)
    peers.calls.clear()
    virtually(fetch_all(courier, source, 3))
    assert list(courier.forged) == ["c"]
    assert "another hash than its leaf" in courier.forged["c"]
    asked = peers.calls["c"]
    other = Source(3, "d", peers.desks["d"].root, 1)
    virtually(fetch_all(courier, other, 3))
    assert peers.calls["c"] == asked


def test_turns_end_a_search_for_what_nobody_has() -> None:
    peers = Peers(*NAMES)
    lost = Source(2, "c", bytes(32), 1)
    courier = Courier(peers, peers.desks["a"], NAMES)
    peers.desks["c"] = desk_of("d")
    with pytest.raises(Unavailable, match="in 2 turns"):
        virtually(courier.leaves(lost, 3, turns=2))
    assert peers.calls == {"b": 2, "c": 2, "d": 2}


def test_a_merged_shard_comes_whole_from_one_holder() -> None:
    peers = Peers(*NAMES)
    parts = [memoryview(b"shard"), memoryview(b"s of"), memoryview(b" one")]
    peers.desks["b"].offer(4, parts[:2])
    peers.desks["c"].offer(4, parts)
    courier = Courier(peers, peers.desks["a"], NAMES)
    got: list[bytes] = []

    async def check(holder: str, payload: bytes) -> str | None:
        got.append(payload)
        return None

    assert virtually(courier.merged(4, [5, 4, 4], ("b", "c"), check, enough=lambda _: False)) == "c"
    assert got == [b"shards of one"]
    assert peers.desks["c"].sent == {SHARDS: 13}


def test_a_desk_says_what_it_has_not_got() -> None:
    desk = desk_of("a")
    for ask in (lambda: desk.leaves("b"), lambda: desk.piece("a", 3), lambda: desk.merged(0, 0)):
        with pytest.raises(Unavailable, match="is not here; ask another replica"):
            ask()
    assert not desk.sent


def test_a_layout_cuts_every_shard_by_itself() -> None:
    layout = Layout.of([10, 4, 9], 4)
    assert layout.sizes == (4, 4, 2, 4, 4, 4, 1)
    assert layout.shards == (range(3), range(3, 4), range(4, 7))
    assert layout.sizes_of(2) == (4, 4, 1)
