"""The ledger: what a miner says it computed in a round, and the receipts that make it worth saying.

A *unit* is one microbatch at one stage in one direction; its leaf binds the digests of what went in and out, the
weight version it was computed with and the replicas on either side. The consumer of a unit's output signs a receipt
over that output, so a liar needs its neighbour's help. A *window* is one local step of one replica: all backward
units with the same version; its head binds the weights they were computed with.

At CUT the ledger closes: leaves and window heads become two byte tables whose hash is the evidence root on chain,
fixed before the audit seed exists. Rows are fixed little-endian layouts, so `work` on chain tells a reader the size.
"""

from __future__ import annotations

import hashlib
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from enum import IntEnum

NO_PEER = 255
NO_DIGEST = bytes(32)
NO_RECEIPT = bytes(64)
MAX_LOSS = 1e4
"""Nats per token; a uniform guess over the largest vocabulary has 12."""

_LEAF = struct.Struct("<BHQIBBf32s32s32s64s")
_WINDOW = struct.Struct("<II32s")
LEAF_BYTES = _LEAF.size
WINDOW_BYTES = _WINDOW.size


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
class Window:
    """One local step: `units` backward units computed with the weights whose digest this is."""

    version: int
    units: int
    weights: bytes

    def encode(self) -> bytes:
        return _WINDOW.pack(self.version, self.units, self.weights)


def receipt_message(run: bytes, number: int, *, producer: str, key: UnitKey, stage: int, output: bytes) -> bytes:
    """What a consumer signs when it accepts the output of `producer`'s unit."""
    unit = struct.pack("<IHQB", number, stage, key.sample, key.direction)
    return b"orion/receipt/1" + run + unit + output + producer.encode()


def digest(data: bytes | bytearray | memoryview) -> bytes:
    """Digest of a tensor's bytes as they crossed the wire (32 bytes)."""
    return hashlib.sha256(data).digest()


@dataclass(frozen=True, slots=True)
class Evidence:
    """A closed ledger: what validators fetch and check against the chain."""

    leaves: tuple[Leaf, ...]
    windows: tuple[Window, ...]

    def tables(self) -> tuple[bytes, bytes]:
        """The two byte tables (leaves, windows) that travel and that the root is taken of."""
        return b"".join(leaf.encode() for leaf in self.leaves), b"".join(w.encode() for w in self.windows)

    @property
    def root(self) -> bytes:
        return evidence_root(*self.tables())

    def check(self, *, stage: int, samples: range) -> None:
        """Refuse evidence that no honest replica of `stage` can have written in a round of these sample ids.

        Every leaf lies in the stage, the round and a window; each unit occurs once; windows follow each other without a
        gap, none is empty, and each counts its backward units. So every leaf can be drawn by an audit, and every
        window that is drawn has a unit to replay. Raises `LedgerError`.
        """
        units: Counter[int] = Counter()
        seen: set[UnitKey] = set()
        for leaf in self.leaves:
            if leaf.stage != stage or leaf.sample not in samples or leaf.key in seen:
                raise LedgerError(f"leaf of sample {leaf.sample} at stage {leaf.stage} is foreign or occurs twice")
            if not 0.0 <= leaf.loss <= MAX_LOSS:
                raise LedgerError(f"leaf of sample {leaf.sample} has loss {leaf.loss}, which no tail reports")
            seen.add(leaf.key)
            units[leaf.version] += leaf.direction is Direction.BACKWARD
        versions = [window.version for window in self.windows]
        gapless = list(range(versions[0], versions[0] + len(versions))) if versions else []
        if versions != sorted(units) or versions != gapless:
            raise LedgerError(f"windows {versions[:5]}… do not follow each other or are not those of the leaves")
        for window in self.windows:
            if window.units != units[window.version]:
                raise LedgerError(
                    f"window {window.version} counts {window.units} units, its leaves are {units[window.version]}"
                )

    @classmethod
    def parse(cls, leaves: bytes | memoryview, windows: bytes | memoryview) -> Evidence:
        """Rows back to leaves and windows. Raises `LedgerError` for a size or direction that cannot be."""
        if len(leaves) % LEAF_BYTES or len(windows) % WINDOW_BYTES:
            raise LedgerError(f"evidence tables of {len(leaves)} and {len(windows)} bytes are not whole rows")
        return cls(tuple(_leaves(leaves)), tuple(Window(*row) for row in _WINDOW.iter_unpack(windows)))


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


def evidence_root(leaves: bytes | memoryview, windows: bytes | memoryview) -> bytes:
    """The hash a record's root binds."""
    return hashlib.sha256(
        b"orion/evidence/1" + hashlib.sha256(leaves).digest() + hashlib.sha256(windows).digest()
    ).digest()


@dataclass
class Ledger:
    """The open book of one replica in one round."""

    _leaves: dict[UnitKey, Leaf] = field(default_factory=dict)
    _windows: dict[int, Window] = field(default_factory=dict)

    def open_window(self, version: int, weights: bytes) -> None:
        self._windows[version] = Window(version, 0, weights)

    def add(self, leaf: Leaf) -> None:
        """Enter a computed unit once; its receipt follows when the consumer has accepted the output."""
        if leaf.key in self._leaves:
            raise LedgerError(f"unit {leaf.key} was computed twice: duplicates must be answered, not recomputed")
        self._leaves[leaf.key] = leaf
        if leaf.direction is Direction.BACKWARD:
            window = self._windows[leaf.version]
            self._windows[leaf.version] = replace(window, units=window.units + 1)

    def receipt(self, key: UnitKey, *, sink: int, signature: bytes) -> None:
        """Enter the consumer's signature for a unit of this round."""
        self._leaves[key] = replace(self._leaves[key], sink=sink, receipt=signature)

    def leaf(self, key: UnitKey) -> Leaf:
        """The leaf of a computed unit."""
        return self._leaves[key]

    def close(self) -> Evidence:
        """Everything entered so far, in the order it was computed; windows without any unit are left out."""
        used = {leaf.version for leaf in self._leaves.values()}
        return Evidence(
            tuple(self._leaves.values()), tuple(window for window in self._windows.values() if window.version in used)
        )
