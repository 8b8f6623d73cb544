"""The record: the one commitment a neuron keeps on chain, at most 128 bytes, always complete.

The chain stores a single commitment per hotkey and every call replaces the last, so a record carries all that others
need of its owner and every update is also the heartbeat. Fixed little-endian layout, 107 bytes:

    magic 3 · phase 1 · run 8 · round 4 · work 4 · root 32 · roster 15 · weights 32 · have 8

`root` binds a round's payload and evidence in one hash, see `bind_roots`. `work` counts the leaves under the evidence
root, so whoever fetches them knows their size before asking.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from enum import IntEnum

_LAYOUT = struct.Struct("<3sB8sII32s15s32sQ")
_MAGIC = b"OR1"
ROSTER_DIGEST_BYTES = 15
MAX_HAVE = 64


class Phase(IntEnum):
    """How far its owner has come in `round`; each phase's record also holds what the earlier ones fixed."""

    READY = 0
    """Serving an axon, waiting for or training in the round."""
    CUT = 1
    """`root` and `work` are fixed."""
    HAVE = 2
    """`have` names the payloads held, by index of their sources in the stage's roster order."""
    DONE = 3
    """`weights` is the digest of the next round's weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    run: bytes
    round: int
    phase: Phase
    work: int = 0
    root: bytes = bytes(32)
    roster: bytes = bytes(ROSTER_DIGEST_BYTES)
    weights: bytes = bytes(32)
    have: int = 0

    def encode(self) -> bytes:
        return _LAYOUT.pack(
            _MAGIC, self.phase, self.run, self.round, self.work, self.root, self.roster, self.weights, self.have
        )

    @classmethod
    def decode(cls, raw: bytes | None) -> Record | None:
        """The record in `raw`, or None when these bytes are something else (another subnet's, a human's)."""
        if raw is None or len(raw) != _LAYOUT.size or not raw.startswith(_MAGIC):
            return None
        _, phase, run, number, work, root, roster, weights, have = _LAYOUT.unpack(raw)
        if phase > Phase.DONE:
            return None
        return cls(
            run=run, round=number, phase=Phase(phase), work=work, root=root, roster=roster, weights=weights, have=have
        )


def bind_roots(payload: bytes, evidence: bytes) -> bytes:
    """One hash that fixes both the payload's and the evidence's root (32 bytes each)."""
    return hashlib.sha256(b"orion/root/1" + payload + evidence).digest()
