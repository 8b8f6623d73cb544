"""Merkle trees over the pieces of a flat state: one root on record, any piece provable with log2(n) hashes.

RFC 6962 hashing (leaf and node prefixes differ, so neither can pass for the other), with the odd node of a level
carried up. The root also binds the number of leaves. A piece is 64 KiB: 16,384 fp32 values, a proof of 19 hashes for a
stage of 6.2 billion parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from model import hashing
from subnet.swarm import content

PIECE_BYTES = 64 << 10
PIECE_VALUES = PIECE_BYTES // 4
"""fp32 values in a piece."""
HASH_BYTES = hashing.DIGEST_BYTES
PROOF_LIMIT = 48
"""Hashes in the longest proof accepted: of 2^48 pieces."""


def _node(left: bytes, right: bytes) -> bytes:
    return hashing.digest(b"\x02", left, right)


def _bind(top: bytes, count: int) -> bytes:
    return hashing.digest(b"\x03orion/tree/2", count.to_bytes(8, "little"), top)


def pieces_of(total: int) -> int:
    """Pieces of `total` bytes."""
    return -(-total // PIECE_BYTES)


def longest_proof(pieces: int) -> int:
    """Hashes beside the way from one of so many leaves to the top, at most."""
    return max(0, pieces - 1).bit_length()


def pieces_in(span: range) -> range:
    """The pieces in which values of a flat fp32 vector lie; of no values none."""
    if not span:
        return range(0)
    return range(span.start // PIECE_VALUES, (span.stop - 1) // PIECE_VALUES + 1)


@dataclass(frozen=True, slots=True)
class Tree:
    """All levels, leaf hashes first. Empty data has no leaves."""

    levels: tuple[tuple[bytes, ...], ...]

    @classmethod
    def of(cls, data: bytes | bytearray | memoryview) -> Tree:
        """Hashes `data`, cut into `PIECE_BYTES`: about a quarter of a second per gigabyte."""
        return cls.over(content.leaves(content.cut(data, piece_bytes=PIECE_BYTES)))

    @classmethod
    def over(cls, leaves: Sequence[bytes]) -> Tree:
        levels = [tuple(leaves)]
        while len(levels[-1]) > 1:
            below = levels[-1]
            above = [_node(below[i], below[i + 1]) for i in range(0, len(below) - 1, 2)]
            levels.append((*above, below[-1]) if len(below) % 2 else tuple(above))
        return cls(tuple(levels))

    @property
    def count(self) -> int:
        return len(self.levels[0])

    @property
    def root(self) -> bytes:
        top = self.levels[-1][0] if self.count else b""
        return _bind(top, self.count)

    def proof(self, index: int) -> tuple[bytes, ...]:
        """The hashes beside the way from leaf `index` to the top. Raises `IndexError`."""
        if not 0 <= index < self.count:
            raise IndexError(f"piece {index} of {self.count}: ask for one that there is")
        found = []
        for level in self.levels[:-1]:
            other = index ^ 1
            if other < len(level):
                found.append(level[other])
            index //= 2
        return tuple(found)


def proven(
    root: bytes, *, count: int, index: int, piece: bytes | bytearray | memoryview, proof: Sequence[bytes]
) -> bool:
    """Whether `piece` is number `index` of the `count` under `root`."""
    if not 0 <= index < count or len(proof) > PROOF_LIMIT:
        return False
    node, at, width, used = content.leaf(piece), index, count, 0
    while width > 1:
        if at ^ 1 < width:
            if used == len(proof):
                return False
            node = _node(proof[used], node) if at % 2 else _node(node, proof[used])
            used += 1
        at //= 2
        width = -(-width // 2)
    return used == len(proof) and _bind(node, count) == root
