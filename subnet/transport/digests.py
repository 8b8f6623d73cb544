"""What is signed of a message: the BLAKE3 of its header and that of its payload, all tensors' bytes end to end.

Two, because the payload of a push is one tensor, whose BLAKE3 the ledger's leaves need at both ends anyway: so each end
hashes it once. Where the header ends its own first eight bytes say, so no two messages have both digests in common.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from model import hashing

LENGTH_BYTES: Final = 8
"""Of the field that a message begins with: bytes of the header that follows, little-endian."""


@dataclass(frozen=True, slots=True)
class Digests:
    """32 bytes each."""

    head: bytes
    """Of the length field and the header."""
    payload: bytes

    @classmethod
    def of(cls, parts: Sequence[memoryview], *, payload: bytes | None = None) -> Digests:
        """Of an encoded message, header first; `payload` is known where the sender has hashed its tensor before."""
        head, *tensors = parts
        return cls(hashing.digest(head), hashing.digest(*tensors) if payload is None else payload)


class Running:
    """The digests of a message whose bytes come in pieces."""

    def __init__(self) -> None:
        self._head = hashing.hasher()
        self._payload = hashing.hasher()
        self._length = bytearray()
        self._start = LENGTH_BYTES
        self._seen = 0

    def update(self, piece: memoryview) -> None:
        """The next bytes."""
        if len(self._length) < LENGTH_BYTES:
            self._length += piece[: LENGTH_BYTES - len(self._length)]
            if len(self._length) == LENGTH_BYTES:
                self._start = LENGTH_BYTES + int.from_bytes(self._length, "little")
        head = max(0, min(piece.nbytes, self._start - self._seen))
        if head:
            self._head.update(piece[:head])
        if head < piece.nbytes:
            self._payload.update(piece[head:])
        self._seen += piece.nbytes

    def digests(self) -> Digests:
        """Of what has come so far."""
        return Digests(self._head.digest(), self._payload.digest())
