"""The public state of a stage as content: its digest on chain fixes every piece of it.

Weights and outer momentum are each cut into pieces (`content.PIECE_BYTES`); the digest binds the two roots. Whoever
knows the digest may take the leaf hashes from anybody, and then any piece from anybody else.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

import torch

from subnet.swarm import content
from subnet.swarm.codec import Codec
from subnet.swarm.merge import Merged
from subnet.transport.synapse import tensor_bytes

Part = Literal["theta", "momentum"]
PARTS: tuple[Part, ...] = ("theta", "momentum")
VALUE_BYTES = 4


@dataclass(frozen=True, slots=True)
class PublicTree:
    """The leaf hashes of both parts, 32 bytes each."""

    theta: tuple[bytes, ...]
    momentum: tuple[bytes, ...]

    @classmethod
    def of(cls, state: Merged) -> PublicTree:
        """Hashes the whole state: about a quarter of a second per gigabyte."""
        return cls(*(_leaves(part_of(state, part)) for part in PARTS))

    @property
    def digest(self) -> bytes:
        return public_digest(content.root(self.theta), content.root(self.momentum))

    def leaves(self, part: Part) -> tuple[bytes, ...]:
        return self.theta if part == "theta" else self.momentum


def public_digest(theta_root: bytes, momentum_root: bytes) -> bytes:
    """A stage's public state in one hash (32 bytes), from the roots of its weights and its outer momentum."""
    return hashlib.sha256(b"orion/public/1" + theta_root + momentum_root).digest()


def digest_of(state: Merged) -> bytes:
    return PublicTree.of(state).digest


def part_of(state: Merged, part: Part) -> torch.Tensor:
    """fp32 (n,)."""
    return state.theta if part == "theta" else state.momentum


def counts_of(parameters: int, codec: Codec) -> dict[Part, int]:
    """Values of each part of a stage's public state: error feedback takes the momentum's place."""
    return {"theta": parameters, "momentum": 0 if codec.error_feedback else parameters}


def pieces_of(count: int) -> int:
    """Pieces of a part with `count` values."""
    return -(-count * VALUE_BYTES // content.PIECE_BYTES)


def span_of(count: int, piece: int) -> tuple[int, int]:
    """First and last byte (exclusive) of a piece of a part with `count` values. Raises `IndexError`."""
    if not 0 <= piece < pieces_of(count):
        raise IndexError(f"piece {piece} of {pieces_of(count)}: ask for one that there is")
    start = piece * content.PIECE_BYTES
    return start, min(start + content.PIECE_BYTES, count * VALUE_BYTES)


def _leaves(values: torch.Tensor) -> tuple[bytes, ...]:
    return content.leaves(content.cut(tensor_bytes(values), piece_bytes=content.PIECE_BYTES))
