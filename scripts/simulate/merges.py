"""One round's merge of a stage: the nodes' own `neurons.merging.merge`, all replicas of it, under a virtual clock.

A vector of some ten thousand values stands for the stage's billions: it is coded, cut, hashed, fetched, checked,
reduced and taken over as it would be, and every byte of it takes as long to send as the bytes it stands for. Arithmetic
takes no time here; nodes do it beside training.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch

from model.optimizer import OuterConfig
from neurons.exchange import Desk, Leaves
from neurons.merging import merge
from neurons.terms import Marks, Outcome, Terms
from scripts.simulate.virtual import Chain, virtually
from subnet.metagraph import BLOCK_SECONDS
from subnet.swarm import content
from subnet.swarm.butterfly import butterfly_bytes, gather_bytes, recheck_bytes
from subnet.swarm.codec import CodecName, codec_of, no_residual
from subnet.swarm.merge import Merged
from subnet.swarm.record import Phase, Record

T = TypeVar("T")

VALUES = 1 << 15
"""That stand for a stage."""
PIECES = 16
"""Most pieces of a payload: 4 MiB each would be hundreds."""
TRANSFERS = 4096
"""About as many in all, where replicas are many: then pieces are larger."""
SLACK = 1.25
"""A phase has room for its transfers and a quarter more."""
MARGIN = 3
"""Blocks before a mark at which a record is handed to the chain (`neurons.rounds`)."""
RUN = b"simulate"


@dataclass(frozen=True, slots=True)
class Transfer:
    """Seconds from the merge's start."""

    start: float
    end: float
    sender: int
    receiver: int
    """Places in the stage."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """What a merge came to."""

    seconds: float
    """From the cut until everybody has the new state: the chain's deadlines included."""
    moving: float
    """Of these, with bytes on some link."""
    sent: float
    """Bytes, mean of a replica."""
    expected: float
    """Bytes by the closed form (`subnet.swarm.butterfly`)."""
    agreed: bool
    """Whether all replicas ended with the same bits."""
    transfers: tuple[Transfer, ...]


def play(
    *, parameters: int, replicas: int, codec: CodecName, up: float, down: float, latency: float, seed: int
) -> Played:
    """One merge of a stage with so many `parameters`; links in bits per second, `latency` in seconds one way.

    Raises `ButterflyError` where the codec's butterfly has no room for so many replicas.
    """
    return virtually(_Stage(parameters, replicas, codec, up, down, latency, seed).play())


class _Stage:
    def __init__(
        self, parameters: int, replicas: int, codec: CodecName, up: float, down: float, latency: float, seed: int
    ) -> None:
        self.codec = codec_of(codec)
        self.names = tuple(f"replica-{place:03d}" for place in range(replicas))
        self.up, self.down, self.latency, self.seed = up, down, latency, seed
        self.payload = self.codec.payload_bytes(parameters)
        small = self.codec.payload_bytes(VALUES)
        self.scale = self.payload / small
        gathers = self.codec.error_feedback
        self.expected = (
            gather_bytes(replicas, self.payload)
            if gathers
            else butterfly_bytes(replicas, self.payload) + recheck_bytes(replicas, self.payload)
        )
        phase = MARGIN + math.ceil(SLACK * 8 * self.expected / min(up, down) / BLOCK_SECONDS) + 1
        self.marks = Marks(cut=phase, have=2 * phase, merge=3 * phase, end=4 * phase, margin=MARGIN)
        most = max(1, min(PIECES, TRANSFERS // (replicas * replicas)))
        self.piece_bytes = max(math.ceil(small / most), math.ceil(content.PIECE_BYTES / self.scale))
        self.outer = OuterConfig(lr=1.0, momentum=0.0) if gathers else OuterConfig(lr=0.7, momentum=0.9)
        self.generator = torch.Generator().manual_seed(seed)
        self.public = Merged(self._draw(1.0), torch.zeros(0) if gathers else self._draw(0.01))
        self.desks: dict[str, Desk] = {}
        self.up_free = dict.fromkeys(self.names, 0.0)
        self.down_free = dict.fromkeys(self.names, 0.0)
        self.transfers: list[Transfer] = []
        self.sent = 0.0

    async def play(self) -> Played:
        self.chain = Chain()
        for name in self.names:
            pieces, _, _ = self._terms(name).contribution(self._draw(0.01), no_residual(self.codec, VALUES, 0.95))
            self.desks[name] = Desk(name, tuple(bytes(piece) for piece in pieces), evidence=bytes(32))
        outcomes = await asyncio.gather(*(self._replica(name) for name in self.names))
        first = outcomes[0].public
        same = all(torch.equal(outcome.public.theta, first.theta) for outcome in outcomes)
        complete = all(outcome.listed and not outcome.incomplete for outcome in outcomes)
        return Played(
            seconds=asyncio.get_running_loop().time(),
            moving=_covered(self.transfers),
            sent=self.sent / len(self.names),
            expected=self.expected,
            agreed=same and complete,
            transfers=tuple(self.transfers),
        )

    async def _replica(self, name: str) -> Outcome:
        record = Record(run=RUN, round=1, phase=Phase.READY, work=1)
        return await merge(
            self._terms(name),
            record,
            self.public,
            self.desks[name],
            board=_Board(self, name),
            exchange=_Link(self, name),
            offload=_inline,
        )

    def _terms(self, name: str) -> Terms:
        return Terms(
            number=1,
            replicas=self.names,
            count=VALUES,
            marks=self.marks,
            codec=self.codec,
            outer=self.outer,
            limit=lambda _: math.inf,
            clip=2.0,
            secret=hashlib.sha256(f"{self.seed} {name}".encode()).digest(),
            piece_bytes=self.piece_bytes,
        )

    def _draw(self, scale: float) -> torch.Tensor:
        return torch.randn(VALUES, generator=self.generator) * scale


async def _inline(work: Callable[[], T]) -> T:
    return work()


@dataclass
class _Board:
    """The chain as one replica uses it."""

    stage: _Stage
    name: str

    async def publish(self, record: Record, *, until: int) -> None:
        block = self.stage.chain.put(self.name, record, until=until)
        await self.wait(until if block is None else block)

    async def records_at(self, block: int) -> Mapping[str, Record | None]:
        return await self.stage.chain.records_at(block)

    async def wait(self, block: int) -> None:
        await self.stage.chain.wait(block)

    async def seed(self, block: int) -> bytes:
        await self.wait(block)
        return hashlib.sha256(f"{self.stage.seed} {block}".encode()).digest()


@dataclass
class _Link:
    """The network as one replica uses it. Bytes leave and arrive in the order in which they are asked for."""

    stage: _Stage
    name: str

    async def leaves(self, holder: str, source: str, pieces: int) -> Leaves:  # noqa: ARG002 - few bytes, all honest
        await asyncio.sleep(self.stage.latency)
        reply = self.stage.desks[holder].leaves(source)
        await asyncio.sleep(self.stage.latency)
        return reply

    async def piece(self, holder: str, source: str, index: int, size: int) -> bytes:
        return await self._fetch(holder, size, lambda desk: desk.piece(source, index))

    async def merged(self, holder: str, shard: int, index: int, size: int) -> bytes:
        return await self._fetch(holder, size, lambda desk: desk.merged(shard, index))

    async def _fetch(self, holder: str, size: int, ask: Callable[[Desk], bytes]) -> bytes:
        stage, loop = self.stage, asyncio.get_running_loop()
        await asyncio.sleep(stage.latency)
        reply = ask(stage.desks[holder])
        bits = 8 * size * stage.scale
        start = max(loop.time(), stage.up_free[holder])
        stage.up_free[holder] = start + bits / stage.up
        first = max(start + stage.latency, stage.down_free[self.name])
        stage.down_free[self.name] = first + bits / stage.down
        end = max(stage.up_free[holder] + stage.latency, stage.down_free[self.name])
        places = stage.names.index(holder), stage.names.index(self.name)
        stage.transfers.append(Transfer(start, end, *places))
        stage.sent += size * stage.scale
        await asyncio.sleep(end - loop.time())
        return reply


def _covered(transfers: list[Transfer]) -> float:
    """Seconds in which at least one of them is under way."""
    total, until = 0.0, 0.0
    for transfer in sorted(transfers, key=lambda transfer: transfer.start):
        total += max(0.0, transfer.end - max(transfer.start, until))
        until = max(until, transfer.end)
    return total
