"""The ledger: what a miner says it computed in a round, and the receipts that make it worth saying.

A *unit* is one microbatch at one stage in one direction; its leaf binds the digests of what went in and out, the
weight version it was computed with and the replicas on either side. The consumer of a unit's output signs a receipt
over that output, so a liar needs its neighbour's help. A *window* is one local step of one replica: all units with the
same version; its head (`subnet.trust.heads`) binds them to the weights they were computed with.

At CUT the ledger closes: leaves, window heads, the validators' acknowledgements of them, and what the cut was taken
from become byte tables whose hash is the evidence root on chain. Rows are fixed little-endian layouts, so `work` on
chain tells a reader the size.
"""

from __future__ import annotations

import hashlib
import struct
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from enum import IntEnum

from model import hashing
from subnet.trust.heads import ACK_BYTES, HEAD_BYTES, Ack, WindowHead, parse_acks, parse_heads

NO_PEER = 255
NO_DIGEST = bytes(32)
NO_RECEIPT = bytes(64)
MAX_LOSS = 1e4
"""Nats per token; a uniform guess over the largest vocabulary has 12."""

_LEAF = struct.Struct("<BHQIBBf32s32s32s64s")
_CLOSING = struct.Struct("<32s32s32s")
LEAF_BYTES = _LEAF.size
CLOSING_BYTES = _CLOSING.size


class Direction(IntEnum):
    FORWARD = 0
    BACKWARD = 1


class LedgerError(Exception):
    """Evidence that is not what its root or its layout promised: one line with the value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaf:
    """One unit. The tail's forward is part of its backward unit, which carries the loss."""

    direction: Direction
    stage: int
    sample: int
    version: int
    """Optimizer steps its replica had done: the weights it was computed with, and the window it belongs to."""
    source: int = NO_PEER
    """Replica index, in the neighbouring stage, of who sent the input (forward) or the gradient (backward)."""
    sink: int = NO_PEER
    """Replica index, in the neighbouring stage, of who received the output."""
    loss: float = 0.0
    input: bytes = NO_DIGEST
    """Digest of x: the boundary tensor, or the token ids at the head."""
    gradient: bytes = NO_DIGEST
    """Digest of g, the gradient that came back for this unit's forward output."""
    output: bytes = NO_DIGEST
    """Digest of y (forward) or dx (backward)."""
    receipt: bytes = NO_RECEIPT
    """The sink's signature over `receipt_message`."""

    def encode(self) -> bytes:
        return _LEAF.pack(
            self.direction,
            self.stage,
            self.sample,
            self.version,
            self.source,
            self.sink,
            self.loss,
            self.input,
            self.gradient,
            self.output,
            self.receipt,
        )

    @property
    def key(self) -> UnitKey:
        return UnitKey(self.sample, self.direction)


@dataclass(frozen=True, slots=True)
class UnitKey:
    """Names a unit within its stage and round; retries of a push repeat it, so they are idempotent."""

    sample: int
    direction: Direction


@dataclass(frozen=True, slots=True)
class Closing:
    """What the cut was taken from, by roots of `subnet.trust.tree` over flat fp32 vectors."""

    weights: bytes
    """The replica's weights at the cut."""
    owed: bytes
    """What error feedback owed before it; `NO_ROOT` for a codec without."""
    still_owed: bytes
    """What it owes after it."""

    def encode(self) -> bytes:
        return _CLOSING.pack(self.weights, self.owed, self.still_owed)


NO_ROOT = bytes(32)
"""Where there is no such vector."""


def units_hash(leaves: Iterable[Leaf]) -> bytes:
    """What a head binds its window's units by: their leaves in the ledger's order, as they were before any receipt."""
    bare = (replace(leaf, sink=NO_PEER, receipt=NO_RECEIPT).encode() for leaf in leaves)
    return hashlib.sha256(b"orion/units/1" + b"".join(bare)).digest()


def receipt_message(run: bytes, number: int, *, producer: str, key: UnitKey, stage: int, output: bytes) -> bytes:
    """What a consumer signs when it accepts the output of `producer`'s unit."""
    unit = struct.pack("<IHQB", number, stage, key.sample, key.direction)
    return b"orion/receipt/1" + run + unit + output + producer.encode()


def digest(data: bytes | bytearray | memoryview) -> bytes:
    """Digest of a tensor's bytes as they crossed the wire (32 bytes)."""
    return hashing.digest(data)


@dataclass(frozen=True, slots=True)
class Tables:
    """A closed ledger as bytes: how it travels, and what the root on chain is taken of."""

    leaves: bytes
    heads: bytes
    acks: bytes
    closing: bytes

    @property
    def root(self) -> bytes:
        """The hash a record's root binds (32 bytes)."""
        tables = (self.leaves, self.heads, self.acks, self.closing)
        return hashlib.sha256(b"orion/evidence/2" + b"".join(hashlib.sha256(t).digest() for t in tables)).digest()


TABLES = tuple(table.name for table in fields(Tables))
"""Their names, as they travel and are kept."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """A closed ledger: what validators fetch and check against the chain."""

    leaves: tuple[Leaf, ...]
    heads: tuple[WindowHead, ...]
    acks: tuple[Ack, ...]
    closing: Closing

    def tables(self) -> Tables:
        return Tables(
            b"".join(leaf.encode() for leaf in self.leaves),
            b"".join(head.encode() for head in self.heads),
            b"".join(ack.encode() for ack in self.acks),
            self.closing.encode(),
        )

    @property
    def size(self) -> int:
        """Bytes of its tables."""
        rows = len(self.leaves) * LEAF_BYTES + len(self.heads) * HEAD_BYTES + len(self.acks) * ACK_BYTES
        return rows + CLOSING_BYTES

    @property
    def root(self) -> bytes:
        return self.tables().root

    def window(self, version: int) -> tuple[Leaf, ...]:
        """The units of one window, in the ledger's order."""
        return tuple(leaf for leaf in self.leaves if leaf.version == version)

    def check(self, *, stage: int, samples: range) -> None:
        """Refuse evidence that no honest replica of `stage` can have written in a round of these sample ids.

        Every leaf lies in the stage, the round and a window; each unit occurs once; windows follow each other, none is
        empty, slots never go back, and each head counts and hashes its own units. So every leaf can be drawn by an
        audit, and every window that is drawn has a unit to replay. Raises `LedgerError`.
        """
        windows: dict[int, list[Leaf]] = {}
        seen: set[UnitKey] = set()
        for leaf in self.leaves:
            if leaf.stage != stage or leaf.sample not in samples or leaf.key in seen:
                raise LedgerError(f"leaf of sample {leaf.sample} at stage {leaf.stage} is foreign or occurs twice")
            if not 0.0 <= leaf.loss <= MAX_LOSS:
                raise LedgerError(f"leaf of sample {leaf.sample} has loss {leaf.loss}, which no tail reports")
            seen.add(leaf.key)
            windows.setdefault(leaf.version, []).append(leaf)
        versions = [head.version for head in self.heads]
        if versions != sorted(windows):
            raise LedgerError(f"windows {versions[:5]}… do not follow each other or are not those of the leaves")
        slots = [head.slot for head in self.heads]
        if slots != sorted(slots):
            raise LedgerError("a window lies in an earlier slot than the one before it")
        for head in self.heads:
            counts = Counter(leaf.direction for leaf in windows[head.version])
            if (head.forward, head.backward) != (counts[Direction.FORWARD], counts[Direction.BACKWARD]):
                raise LedgerError(
                    f"window {head.version} counts {head.forward} + {head.backward} units, its leaves are "
                    f"{counts[Direction.FORWARD]} + {counts[Direction.BACKWARD]}"
                )
            if units_hash(windows[head.version]) != head.units:
                raise LedgerError(f"the units of window {head.version} do not hash to its head")

    @classmethod
    def parse(cls, tables: Tables) -> Evidence:
        """Tables back to rows. Raises `LedgerError` for a size, direction or hotkey that cannot be."""
        if len(tables.leaves) % LEAF_BYTES or len(tables.closing) != CLOSING_BYTES:
            raise LedgerError(f"evidence tables of {len(tables.leaves)} bytes are not whole rows")
        try:
            heads, acks = parse_heads(tables.heads), parse_acks(tables.acks)
        except ValueError as error:
            raise LedgerError(str(error)) from error
        return cls(tuple(_leaves(tables.leaves)), heads, acks, Closing(*_CLOSING.unpack(tables.closing)))


def _leaves(table: bytes | memoryview) -> Iterator[Leaf]:
    for row in _LEAF.iter_unpack(table):
        direction, stage, sample, version, source, sink, loss, x, g, out, receipt = row
        if direction > Direction.BACKWARD:
            raise LedgerError(f"leaf of sample {sample} has direction {direction}, which does not exist")
        yield Leaf(
            direction=Direction(direction),
            stage=stage,
            sample=sample,
            version=version,
            source=source,
            sink=sink,
            loss=loss,
            input=x,
            gradient=g,
            output=out,
            receipt=receipt,
        )


@dataclass
class Ledger:
    """The open book of one replica in one round."""

    _leaves: dict[UnitKey, Leaf] = field(default_factory=dict)
    _heads: list[WindowHead] = field(default_factory=list)

    def add(self, leaf: Leaf) -> None:
        """Enter a computed unit once; its receipt follows when the consumer has accepted the output."""
        if leaf.key in self._leaves:
            raise LedgerError(f"unit {leaf.key} was computed twice: duplicates must be answered, not recomputed")
        self._leaves[leaf.key] = leaf

    def receipt(self, key: UnitKey, *, sink: int, signature: bytes) -> None:
        """Enter the consumer's signature for a unit of this round."""
        self._leaves[key] = replace(self._leaves[key], sink=sink, receipt=signature)

    def leaf(self, key: UnitKey) -> Leaf:
        """The leaf of a computed unit."""
        return self._leaves[key]

    def window(self, version: int) -> tuple[Leaf, ...]:
        """The units entered so far with these weights."""
        return tuple(leaf for leaf in self._leaves.values() if leaf.version == version)

    def close_window(self, head: WindowHead) -> None:
        """Enter a window's head, once all of its units are in."""
        self._heads.append(head)

    def close(self, closing: Closing) -> Evidence:
        """Everything entered so far, in the order it was computed; acknowledgements are still to come."""
        return Evidence(tuple(self._leaves.values()), tuple(self._heads), (), closing)
