"""One stage's replicas in one process: the real merge over an in-memory chain and transport, on a clock of its own.

Time passes only when everybody waits, so a round of minutes takes as long as its arithmetic. Latencies are drawn from
a seed. A replica can be killed at any moment; what it publishes or serves can be bent.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
import torch

from model.optimizer import OuterConfig
from neurons.exchange import Desk, Leaves
from neurons.merging import judge_shard, merge
from neurons.terms import Marks, Outcome, Terms
from scripts.simulate.virtual import Chain, virtually
from subnet.metagraph import BLOCK_SECONDS
from subnet.swarm.codec import codec_of, no_residual
from subnet.swarm.merge import Merged
from subnet.swarm.record import Phase, Record
from subnet.transport.errors import BadReply, Unreachable

T = TypeVar("T")

BLOCK = BLOCK_SECONDS
SILENCE = 15.0
"""Seconds after which a call to somebody dead is given up."""
BYTES_PER_SECOND = 25e6
MARKS = Marks(cut=1, have=5, merge=9, end=12, margin=1)
NUMBER = 7


Bend = Callable[[Record], Record | None]


@dataclass
class ChainBoard:
    """The chain as one replica uses it; `bend` is what it puts there in place of the truth, None for nothing."""

    chain: Chain
    hotkey: str
    seeding: int
    bend: Bend

    async def publish(self, record: Record, *, until: int) -> None:
        bent = self.bend(record)
        block = None if bent is None else self.chain.put(self.hotkey, bent, until=until)
        await self.wait(until if block is None else block)

    async def records_at(self, block: int) -> Mapping[str, Record | None]:
        return await self.chain.records_at(block)

    async def wait(self, block: int) -> None:
        await self.chain.wait(block)

    async def seed(self, block: int) -> bytes:
        await self.wait(block)
        return hashlib.sha256(f"{self.seeding} {block}".encode()).digest()


Request = tuple[str, str, int]
"""(what, whose, index): "leaves", "piece" or "merged <shard>"."""
Forge = Callable[[str, str, Request, object], object]
"""(holder, asker, request, true reply) to the reply."""


@dataclass
class Stage:
    """`deltas` are the replicas' pseudo-gradients, by hotkey; the rest has defaults that fit an honest round."""

    replicas: int
    codec: str = "bf16"
    count: int = 2000
    seed: int = 0
    outer: OuterConfig = OuterConfig(lr=0.7, momentum=0.9)  # noqa: RUF009 - frozen
    limit: float = 1.0
    clip: float = 2.0
    latency: tuple[float, float] = (0.02, 0.3)
    """Seconds one way, from least to most."""
    piece_bytes: int = 512
    public: Merged | None = None
    bends: dict[str, Bend] = field(default_factory=dict)
    deaths: dict[str, float] = field(default_factory=dict)
    """Seconds at which a replica is killed."""
    forge: Forge | None = None
    watcher: str | None = None
    """Who only watches the merge."""

    def __post_init__(self) -> None:
        self.names = tuple(f"hotkey-{index:02d}" for index in range(self.replicas))
        self.generator = torch.Generator().manual_seed(self.seed)
        self.codec_used = codec_of(self.codec)
        if self.codec_used.error_feedback:
            self.outer = OuterConfig(lr=1.0, momentum=0.0)
        if self.public is None:
            empty = self.codec_used.error_feedback
            self.public = Merged(self.draw(1.0), torch.zeros(0) if empty else self.draw(0.01))
        self.deltas = {hotkey: self.draw(0.01) for hotkey in self.names}
        self.desks: dict[str, Desk] = {}
        self.dead: set[str] = set()
        self.ended: dict[str, float] = {}

    def draw(self, scale: float) -> torch.Tensor:
        return torch.randn(self.count, generator=self.generator) * scale

    def terms(self, hotkey: str) -> Terms:
        return Terms(
            number=NUMBER,
            replicas=self.names,
            count=self.count,
            marks=MARKS,
            codec=self.codec_used,
            outer=self.outer,
            limit=lambda _: self.limit,
            clip=self.clip,
            secret=hashlib.sha256(f"{self.seed} {hotkey}".encode()).digest(),
            piece_bytes=self.piece_bytes,
        )

    def play(self) -> dict[str, Outcome]:
        """One round's merge; the outcomes of those who live."""
        return virtually(self._play())

    async def _play(self) -> dict[str, Outcome]:
        self.chain = chain = Chain()
        for hotkey in self.names:
            feedback = no_residual(self.codec_used, self.count, 0.95)
            pieces, _, _ = self.terms(hotkey).contribution(self.deltas[hotkey], feedback)
            self.prepare(hotkey, tuple(bytes(piece) for piece in pieces))
        names = self.names
        if self.watcher is not None:
            names = (*names, self.watcher)
            self.desks[self.watcher] = Desk(self.watcher)
        tasks = {hotkey: asyncio.ensure_future(self._replica(hotkey, chain)) for hotkey in names}
        for hotkey, moment in self.deaths.items():
            asyncio.get_running_loop().call_later(moment, self._kill, hotkey, tasks[hotkey])
        results = await asyncio.gather(*tasks.values(), return_exceptions=True)
        outcomes = {}
        for hotkey, result in zip(tasks, results, strict=True):
            if isinstance(result, Outcome):
                outcomes[hotkey] = result
            elif not (isinstance(result, asyncio.CancelledError) and hotkey in self.dead):
                raise AssertionError(hotkey) from result
        return {hotkey: outcome for hotkey, outcome in outcomes.items() if hotkey not in self.deaths}

    def prepare(self, hotkey: str, pieces: tuple[bytes, ...]) -> None:
        self.desks[hotkey] = Desk(hotkey, pieces, evidence=hotkey.encode().ljust(32, b"e"))

    def _kill(self, hotkey: str, task: asyncio.Task[Outcome]) -> None:
        self.dead.add(hotkey)
        task.cancel()

    def judge(self, shard: int) -> tuple[str, ...]:
        """What somebody finds who is told of one shard when the merge is over."""
        assert self.public is not None
        board = ChainBoard(self.chain, "judge", self.seed, lambda record: record)
        link = Link(self, "judge")
        return virtually(
            judge_shard(self.terms("judge"), self.public, shard, board=board, exchange=link, offload=inline)
        )

    async def _replica(self, hotkey: str, chain: Chain) -> Outcome:
        assert self.public is not None
        board = ChainBoard(chain, hotkey, self.seed, self.bends.get(hotkey, lambda record: record))
        record = Record(run=b"run-0001", round=NUMBER, phase=Phase.READY, work=4)
        outcome = await merge(
            self.terms(hotkey),
            record if hotkey != self.watcher else None,
            self.public,
            self.desks[hotkey],
            board=board,
            exchange=Link(self, hotkey),
            offload=inline,
        )
        self.ended[hotkey] = asyncio.get_running_loop().time()
        return outcome


async def inline(work: Callable[[], T]) -> T:
    """On a virtual clock nothing may run beside the loop."""
    return work()


class Link:
    """The transport as one replica uses it."""

    def __init__(self, stage: Stage, hotkey: str) -> None:
        self._stage = stage
        self._hotkey = hotkey
        self._chance = np.random.default_rng([stage.seed, *hotkey.encode()])

    async def leaves(self, holder: str, source: str, pieces: int) -> Leaves:
        reply = await self._call(holder, ("leaves", source, 0), lambda desk: desk.leaves(source))
        if len(reply[0]) != pieces:
            raise BadReply(f"{len(reply[0])} leaves where {pieces} are asked for")
        return reply

    async def piece(self, holder: str, source: str, index: int, size: int) -> bytes:
        reply = await self._call(holder, ("piece", source, index), lambda desk: desk.piece(source, index))
        return await self._sized(reply, size)

    async def merged(self, holder: str, shard: int, index: int, size: int) -> bytes:
        reply = await self._call(holder, (f"merged {shard}", holder, index), lambda desk: desk.merged(shard, index))
        return await self._sized(reply, size)

    async def _sized(self, reply: bytes, size: int) -> bytes:
        if len(reply) != size:
            raise BadReply(f"{len(reply)} bytes where {size} are asked for")
        await asyncio.sleep(size / BYTES_PER_SECOND)
        return reply

    async def _call(self, holder: str, request: Request, ask: Callable[[Desk], T]) -> T:
        stage = self._stage
        way = float(self._chance.uniform(*stage.latency))
        await asyncio.sleep(way)
        if holder not in stage.dead:
            reply = ask(stage.desks[holder])
            if stage.forge is not None:
                reply = stage.forge(holder, self._hotkey, request, reply)  # type: ignore[assignment]
            await asyncio.sleep(way)
        if holder in stage.dead:
            await asyncio.sleep(SILENCE)
            raise Unreachable(f"{holder} does not answer")
        return reply


def digests_replaced(record: Record, digests: bytes) -> Record:
    """The record with other shard digests, where it has any."""
    return replace(record, shards=digests) if record.shards else record
