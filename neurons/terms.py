"""What a merge is played by and what it comes to: the chain as it sees it, its deadlines, its terms, its outcome."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from model.optimizer import OuterConfig
from subnet.swarm import content
from subnet.swarm.butterfly import ranges
from subnet.swarm.codec import Codec, Feedback, compress
from subnet.swarm.merge import Merged, Source
from subnet.swarm.record import Record

T = TypeVar("T")


class Board(Protocol):
    """The chain, as far as a merge sees it. Every call ends at the block it names, or soon after."""

    async def publish(self, record: Record, *, until: int) -> None:
        """Put the record on chain, or give up at block `until`. A missed mark raises nothing: the marks tell."""

    async def records_at(self, block: int) -> Mapping[str, Record | None]:
        """Every hotkey's record at `block`, once it is final."""

    async def wait(self, block: int) -> None:
        """Until `block` is final."""

    async def seed(self, block: int) -> bytes:
        """A public seed that nobody knew before `block`."""


class Offload(Protocol):
    """Runs what keeps a core busy away from the event loop, as `asyncio.to_thread`."""

    def __call__(self, work: Callable[[], T], /) -> Awaitable[T]: ...


@dataclass(frozen=True, slots=True)
class Marks:
    """The merge's deadlines as block numbers. A record must be on chain at its mark."""

    cut: int
    have: int
    merge: int
    end: int
    margin: int
    """Blocks before a mark at which its record is handed to the chain: what finality and inclusion take."""


@dataclass(frozen=True, slots=True)
class Layout:
    """A payload's pieces. A butterfly encodes and cuts every shard by itself; an all-gather is one shard."""

    sizes: tuple[int, ...]
    """Bytes of each piece."""
    shards: tuple[range, ...]
    """The pieces of each shard."""

    @classmethod
    def of(cls, totals: Iterable[int], piece_bytes: int) -> Layout:
        """Of shards with so many bytes each."""
        sizes: list[int] = []
        shards: list[range] = []
        for total in totals:
            first = len(sizes)
            sizes.extend(min(piece_bytes, total - start) for start in range(0, total, piece_bytes))
            shards.append(range(first, len(sizes)))
        return cls(tuple(sizes), tuple(shards))

    def sizes_of(self, shard: int) -> tuple[int, ...]:
        pieces = self.shards[shard]
        return self.sizes[pieces.start : pieces.stop]


@dataclass(frozen=True, slots=True)
class Terms:
    """What a round's merge is played by, equal on all replicas of the stage but for the secret."""

    number: int
    replicas: tuple[str, ...]
    """Of the stage, in hotkey order."""
    count: int
    """Parameters of the stage."""
    marks: Marks
    codec: Codec
    outer: OuterConfig
    limit: Callable[[int], float]
    """Largest magnitude in the payload of so many units of work."""
    clip: float
    """Times the median norm that a contribution may have, see `subnet.swarm.clip`."""
    secret: bytes
    """Chooses the shard to recheck; its owner's alone."""
    piece_bytes: int = content.PIECE_BYTES

    @property
    def gathers(self) -> bool:
        """All-gather, or butterfly."""
        return self.codec.error_feedback

    def layout(self) -> Layout:
        """How a payload lies in pieces. Raises `ButterflyError`."""
        if self.gathers:
            return Layout.of([self.codec.payload_bytes(self.count)], self.piece_bytes)
        parts = ranges(len(self.replicas), self.count)
        return Layout.of([self.codec.payload_bytes(len(part)) for part in parts], self.piece_bytes)

    def contribution(
        self, delta: torch.Tensor, feedback: Feedback
    ) -> tuple[tuple[memoryview, ...], torch.Tensor, Feedback]:
        """The pieces of a pseudo-gradient (fp32 (count,)), what they say (fp32 (count,)), and what stays owed.

        Raises `DeltaError` and `ButterflyError`.
        """
        if self.gathers:
            payload, sent, owed = compress(self.codec, delta, feedback)
            return content.cut(payload, piece_bytes=self.piece_bytes), sent, owed
        parts = [delta[part.start : part.stop] for part in ranges(len(self.replicas), self.count)]
        encoded = [self.codec.encode(part) for part in parts]
        pieces = tuple(piece for shard in encoded for piece in content.cut(shard, piece_bytes=self.piece_bytes))
        said = [self.codec.decode(shard, len(part)) for shard, part in zip(encoded, parts, strict=True)]
        return pieces, torch.cat(said).to(delta.device), feedback


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a merge came to on one replica."""

    public: Merged
    """The next public state; where it is `incomplete`, what could not be had keeps its old value."""
    record: Record | None
    """As last published; None of who only watched."""
    listed: tuple[Source, ...]
    """The sources that the chain counts; none if the round is void."""
    merged: tuple[range, ...]
    """Where the public state moved."""
    carried: tuple[range, ...]
    """Where it keeps its old value."""
    taken: tuple[range, ...]
    """Where this replica's contribution is in it. Elsewhere it stays pending."""
    incomplete: bool
    """The chain says that more was merged than could be had here: take the public state from a sibling."""
    refused: Mapping[str, str]
    """Sources whose payload, or a piece of it, is no valid content, and why. It counts nowhere."""
    forged: Mapping[str, str]
    """Replicas that gave bytes of another hash than the one fixed on chain, and which bytes."""
    liars: Mapping[str, tuple[int, ...]]
    """Holders that published a digest other than the recomputed one, and of which shards."""
    received: Mapping[str, int]
    """Bytes by leg."""
    sent: Mapping[str, int]
    """Bytes by leg until now; the desk counts on."""

    @property
    def included(self) -> bool:
        return bool(self.taken)
