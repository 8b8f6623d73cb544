"""Content-addressed bytes: what is too large for one message is cut into pieces, each known by its hash.

A root fixes all pieces, so a receiver may take any piece from whoever has it and check it on arrival, and who put the
root on chain cannot send different things to different peers. Payloads of a merge and public states use it alike.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

PIECE_BYTES = 4 << 20
"""Largest piece of a cut that has no reason to be another: a few round trips at 200 Mbit/s."""
LEAF_BYTES = 32


def cut(data: bytes | bytearray | memoryview, *, piece_bytes: int = PIECE_BYTES) -> tuple[memoryview, ...]:
    """Views of `data` of `piece_bytes` each, the last one shorter; none of empty data."""
    view = memoryview(data).cast("B")
    return tuple(view[start : start + piece_bytes] for start in range(0, len(view), piece_bytes))


def leaf(piece: bytes | bytearray | memoryview) -> bytes:
    """The hash one piece is known by."""
    digest = hashlib.sha256(b"\x00")
    digest.update(piece)
    return digest.digest()


def leaves(pieces: Iterable[bytes | bytearray | memoryview]) -> tuple[bytes, ...]:
    return tuple(leaf(piece) for piece in pieces)


def root(hashes: Sequence[bytes]) -> bytes:
    """32 bytes that fix the pieces, their order and their number."""
    return hashlib.sha256(b"\x01orion/content/1" + len(hashes).to_bytes(8, "little") + b"".join(hashes)).digest()
