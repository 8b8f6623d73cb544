"""Content-addressed bytes: what is too large for one message is cut into pieces, each known by its hash.

A root fixes all pieces, so a receiver may take any piece from whoever has it and check it on arrival, and who put the
root on chain cannot send different things to different peers. Payloads of a merge and public states use it alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from model import hashing

PIECE_BYTES = 4 << 20
"""Largest piece of a cut that has no reason to be another: a few round trips at 200 Mbit/s."""
LEAF_BYTES = hashing.DIGEST_BYTES


def cut(data: bytes | bytearray | memoryview, *, piece_bytes: int = PIECE_BYTES) -> tuple[memoryview, ...]:
    """Views of `data` of `piece_bytes` each, the last one shorter; none of empty data."""
    view = memoryview(data).cast("B")
    return tuple(view[start : start + piece_bytes] for start in range(0, len(view), piece_bytes))


def leaf(piece: bytes | bytearray | memoryview) -> bytes:
    """The hash one piece is known by."""
    return hashing.digest(b"\x00", piece)


def leaves(pieces: Iterable[bytes | bytearray | memoryview]) -> tuple[bytes, ...]:
    return tuple(leaf(piece) for piece in pieces)


def root(hashes: Sequence[bytes]) -> bytes:
    """32 bytes that fix the pieces, their order and their number."""
    return hashing.digest(b"\x01orion/content/2", len(hashes).to_bytes(8, "little"), *hashes)
