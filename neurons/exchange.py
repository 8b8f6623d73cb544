"""What replicas hand each other in a merge: leaves, pieces and merged shards, asked for and answered.

Everything asked for is fixed by a hash on chain, so it may come from anybody: the `Courier` asks the source first, then
the others, passes over who does not answer, and never asks again who gave bytes of another hash. The `Desk` is the
other side: what this replica has of one round, for as long as the round's evidence is kept.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial
from itertools import count
from typing import Protocol, TypeVar

from subnet.swarm import content
from subnet.swarm.merge import Source
from subnet.swarm.record import bind_roots
from subnet.transport.errors import BadReply, TransportError, Unavailable, Unreachable

log = logging.getLogger("orion.neurons.exchange")

T = TypeVar("T")
Leaves = tuple[tuple[bytes, ...], bytes]
"""The hashes of a payload's pieces, and the evidence root that its commitment binds with theirs."""

RETRY_PAUSE = 0.2
LONGEST_PAUSE = 5.0
"""Seconds before all holders are asked again: at first, and at most, doubled in between."""
CALLS_PER_HOLDER = 4
"""At once; the more replicas, the more in all, and one that hangs holds up only what is asked of it."""
LEAVES, PIECES, SHARDS, RECHECK = "leaves", "pieces", "shards", "recheck"
"""Legs of a merge's traffic."""


class Exchange(Protocol):
    """Asks one holder for one thing. Each call has a deadline of its own and raises `TransportError`."""

    async def leaves(self, holder: str, source: str, pieces: int) -> Leaves:
        """The `pieces` leaves of the source's payload."""

    async def piece(self, holder: str, source: str, index: int, size: int) -> bytes:
        """One piece of the source's payload, `size` bytes."""

    async def merged(self, holder: str, shard: int, index: int, size: int) -> bytes:
        """One piece of the encoded mean change of a shard, `size` bytes."""


async def together(works: Iterable[Awaitable[T]]) -> list[T]:
    """All of them at once, each to its end; then raises what the first that failed raised."""
    results = await asyncio.gather(*works, return_exceptions=True)
    done = []
    for result in results:
        if isinstance(result, BaseException):
            raise result
        done.append(result)
    return done


class Desk:
    """What one node has of one stage's round and serves.

    A replica's own contribution is `pieces` with the evidence root. Who only watches the merge has none: no `evidence`.
    """

    def __init__(
        self, hotkey: str, pieces: Sequence[bytes | memoryview] = (), *, evidence: bytes | None = None
    ) -> None:
        self.hotkey = hotkey
        self.sent: Counter[str] = Counter()
        """Bytes handed out, by leg; a recheck's pieces are pieces here."""
        hashes = content.leaves(pieces)
        self._leaves: dict[str, Leaves] = {} if evidence is None else {hotkey: (hashes, evidence)}
        self._pieces = {(hotkey, index): bytes(piece) for index, piece in enumerate(pieces)}
        self._merged: dict[int, tuple[memoryview, ...]] = {}
        self.payload_root = content.root(hashes)
        self.root = None if evidence is None else bind_roots(self.payload_root, evidence)
        """What this replica commits to at CUT."""

    def hold_leaves(self, source: str, leaves: Leaves) -> None:
        self._leaves[source] = leaves

    def hold(self, source: str, index: int, piece: bytes) -> None:
        self._pieces[source, index] = piece

    def offer(self, shard: int, pieces: Sequence[memoryview]) -> None:
        """Serve a merged shard: one merged here, or proven by the digest on chain."""
        self._merged[shard] = tuple(pieces)

    def leaves_of(self, source: str) -> Leaves | None:
        return self._leaves.get(source)

    def piece_of(self, source: str, index: int) -> bytes | None:
        return self._pieces.get((source, index))

    def leaves(self, source: str) -> Leaves:
        """The answer to `Exchange.leaves`. Raises `Unavailable`, as the next two."""
        return self._answer(LEAVES, self._leaves.get(source), f"leaves of {source[:60]}", leaf_bytes)

    def piece(self, source: str, index: int) -> bytes:
        return self._answer(PIECES, self._pieces.get((source, index)), f"piece {index} of {source[:60]}", len)

    def merged(self, shard: int, index: int) -> bytes:
        pieces = self._merged.get(shard, ())
        found = bytes(pieces[index]) if 0 <= index < len(pieces) else None
        return self._answer(SHARDS, found, f"piece {index} of merged shard {shard}", len)

    def _answer(self, leg: str, found: T | None, what: str, size: Callable[[T], int]) -> T:
        if found is None:
            raise Unavailable(
                f"{what} is not here", "ask another replica, or again after the pause", retry_after=RETRY_PAUSE
            )
        self.sent[leg] += size(found)
        return found


def leaf_bytes(leaves: Leaves) -> int:
    hashes, evidence = leaves
    return sum(map(len, hashes)) + len(evidence)


Check = Callable[[str, T], Awaitable[str | None]]
"""(holder, reply): what its holder is to blame for, None if the reply will do. Raises `BadReply` for one that will not
do though nobody need be to blame."""


class Courier:
    """Fetches one round's things for one replica into its desk.

    Without `turns` a fetch tries on until it is cancelled, which its caller does at a mark; with them it gives up after
    so many rounds of all holders and raises `Unavailable`.
    """

    def __init__(self, exchange: Exchange, desk: Desk, replicas: Sequence[str]) -> None:
        self._exchange = exchange
        self._desk = desk
        here = replicas.index(desk.hotkey) if desk.hotkey in replicas else len(replicas)
        self._others = (*replicas[here + 1 :], *replicas[:here])
        self._gates = {holder: asyncio.Semaphore(CALLS_PER_HOLDER) for holder in self._others}
        self._wanted: defaultdict[tuple[str, int], asyncio.Lock] = defaultdict(asyncio.Lock)
        self._silent: Counter[str] = Counter()
        self.received: Counter[str] = Counter()
        """Bytes taken in, by leg."""
        self.forged: dict[str, str] = {}
        """Who gave bytes that are not what the chain or the leaves say, and which. Nothing more is asked of them."""

    async def leaves(self, source: Source, pieces: int, *, turns: int | None = None) -> Leaves:
        """The leaves of a source, proven by its root on chain."""

        async def check(_: str, reply: Leaves) -> str | None:
            self.received[LEAVES] += leaf_bytes(reply)
            if bind_roots(content.root(reply[0]), reply[1]) == source.root:
                return None
            return f"gave leaves of {source.hotkey} that have another root than the one on chain"

        async with self._wanted[source.hotkey, -1]:
            held = self._desk.leaves_of(source.hotkey)
            if held is not None:
                return held
            _, leaves = await self._ask(
                self._in_turn(source.hotkey),
                lambda holder: self._call(holder, partial(self._exchange.leaves, source=source.hotkey, pieces=pieces)),
                check,
                lambda turn: turn == turns,
            )
            self._desk.hold_leaves(source.hotkey, leaves)
        return leaves

    async def piece(
        self,
        source: Source,
        leaf: bytes,
        index: int,
        size: int,
        *,
        leg: str = PIECES,
        near: Sequence[str] = (),
        turns: int | None = None,
    ) -> bytes:
        """One piece, proven by its leaf. After the source those `near` are asked, then all others."""

        async def check(_: str, piece: bytes) -> str | None:
            self.received[leg] += len(piece)
            if content.leaf(piece) == leaf:
                return None
            return f"gave a piece {index} of {source.hotkey} that has another hash than its leaf"

        async with self._wanted[source.hotkey, index]:
            held = self._desk.piece_of(source.hotkey, index)
            if held is not None:
                return held
            _, piece = await self._ask(
                self._in_turn(source.hotkey, *near),
                lambda holder: self._call(
                    holder, partial(self._exchange.piece, source=source.hotkey, index=index, size=size)
                ),
                check,
                lambda turn: turn == turns,
            )
            self._desk.hold(source.hotkey, index, piece)
        return piece

    async def merged(
        self,
        shard: int,
        sizes: Sequence[int],
        holders: Sequence[str],
        check: Check[bytes],
        *,
        enough: Callable[[int], bool],
    ) -> str:
        """A merged shard that passes `check`, all of it from one of the `holders`; returns which.

        After each turn `enough` says of their number whether to give up. Raises `Unavailable` then.
        """

        async def whole(holder: str) -> bytes | None:
            pieces: list[bytes] = []
            for start in range(0, len(sizes), CALLS_PER_HOLDER):
                some = await together(
                    self._call(holder, partial(self._exchange.merged, shard=shard, index=index, size=sizes[index]))
                    for index in range(start, min(start + CALLS_PER_HOLDER, len(sizes)))
                )
                pieces.extend(piece for piece in some if piece is not None)
                self.received[SHARDS] += sum(len(piece) for piece in some if piece is not None)
                if None in some:
                    return None
            return b"".join(pieces)

        others = [holder for holder in holders if holder in self._gates]
        holder, _ = await self._ask(others, whole, check, enough)
        return holder

    def blame(self, holder: str, wrong: str) -> None:
        self.forged.setdefault(holder, wrong)

    def _in_turn(self, *first: str) -> list[str]:
        """All other replicas: those named first, then from the next one round the circle, which spreads the asking."""
        named = [holder for holder in first if holder in self._gates]
        return [*named, *(holder for holder in self._others if holder not in named)]

    async def _ask(
        self,
        holders: Sequence[str],
        get: Callable[[str], Awaitable[T | None]],
        check: Check[T],
        enough: Callable[[int], bool],
    ) -> tuple[str, T]:
        for turn in count(1):
            for holder in sorted(holders, key=lambda holder: self._silent[holder]):
                reply = await get(holder)
                if reply is None:
                    continue
                try:
                    wrong = await check(holder, reply)
                except BadReply as useless:
                    log.debug("%s: %s", holder, useless)
                    continue
                if wrong is None:
                    return holder, reply
                self.blame(holder, wrong)
            if enough(turn):
                raise Unavailable(f"no replica had it in {turn} turns", "ask again later")
            await asyncio.sleep(min(LONGEST_PAUSE, RETRY_PAUSE * 2.0 ** (turn - 1)))
        raise AssertionError("count ends")

    async def _call(self, holder: str, call: Callable[[str], Awaitable[T]]) -> T | None:
        """The holder's reply, None if it has none. Who fell silent while this call waited its turn is passed over."""
        silent = self._silent[holder]
        async with self._gates[holder]:
            if holder in self.forged or self._silent[holder] > silent:
                return None
            try:
                return await call(holder)
            except (Unreachable, BadReply):
                self._silent[holder] += 1
            except TransportError as refusal:
                log.debug("%s: %s", holder, refusal)
        return None
