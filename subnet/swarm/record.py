"""The record: the one commitment a neuron keeps on chain, at most 128 bytes, always complete.

The chain stores a single commitment per hotkey and every call replaces the last, so a record carries all that others
need of its owner and every update is also the heartbeat. Fixed little-endian layout, 108 bytes:

    magic 3 · phase 1 · flags 1 · run 8 · round 4 · work 4 · root 32 · roster 15 · weights 32 · have 8

`root` binds a round's payload and evidence in one hash, see `bind_roots`. `work` counts the leaves under the evidence
root, so whoever fetches them knows their size before asking. Where a merge cuts the weights into shards, their digests
stand in the commitment's second field, 8 bytes each, at most 16 of them. A validator's second field names whom it holds
convicted, in the same form.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from enum import IntEnum, IntFlag

_LAYOUT = struct.Struct("<3sBB8sII32s15s32sQ")
_MAGIC = b"OR2"
ROSTER_DIGEST_BYTES = 15
SHARD_DIGEST_BYTES = 8
SHARDS_LIMIT = 128
NAMES_LIMIT = SHARDS_LIMIT // SHARD_DIGEST_BYTES
MAX_HAVE = 64


def short_name(hotkey: str) -> bytes:
    """8 bytes for a hotkey; 2^-64 that two are alike."""
    return hashlib.sha256(b"orion/name/1" + hotkey.encode()).digest()[:SHARD_DIGEST_BYTES]


class Phase(IntEnum):
    """How far its owner has come in `round`; each phase's record also holds what the earlier ones fixed."""

    READY = 0
    """Serving an axon; holds the public state at the start of the round, or none yet."""
    CUT = 1
    """`root` and `work` are fixed."""
    HAVE = 2
    """`have` names the payloads held, by index of their sources in the stage's roster order."""
    DONE = 3
    """The round is merged: `weights` is the public state at the start of the next."""


class Flags(IntFlag):
    LEAVING = 1
    """Its owner wants out at the next roster."""
    OBSERVER = 2
    """Its owner wants no stage at all: a validator, whose record says which roster it sees."""


DEVICE_SHIFT = 4
"""The flags' upper half names the class of the device that its owner computes with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What one hotkey says of itself. `run` 8 bytes, `root` and `weights` 32, `roster` 15."""

    run: bytes
    round: int
    phase: Phase
    flags: int = 0
    work: int = 0
    root: bytes = bytes(32)
    roster: bytes = bytes(ROSTER_DIGEST_BYTES)
    weights: bytes = bytes(32)
    """Digest of the public state its owner holds now, in every phase; zero while it holds none."""
    have: int = 0
    shards: bytes = b""
    """Digests of merged shards, of an observer names of convicts: `SHARD_DIGEST_BYTES` each, from the commitment's
    second field."""

    @property
    def stageless(self) -> bool:
        """Whether its owner wants no stage, or none any more."""
        return bool(self.flags & (Flags.LEAVING | Flags.OBSERVER))

    @property
    def convicts(self) -> frozenset[bytes]:
        """Short names of those whom an observer holds convicted; nobody of a miner."""
        if not self.flags & Flags.OBSERVER:
            return frozenset()
        return frozenset(
            self.shards[start : start + SHARD_DIGEST_BYTES] for start in range(0, len(self.shards), SHARD_DIGEST_BYTES)
        )

    @property
    def device(self) -> int:
        """Number of a device class (`subnet.trust.tolerance`), 0 where it names none."""
        return self.flags >> DEVICE_SHIFT

    @property
    def held(self) -> int:
        """Rounds merged into the public state behind `weights`."""
        return self.round + 1 if self.phase is Phase.DONE else self.round

    def fixes(self, number: int) -> bool:
        """Whether its root stands for round `number`, payload and evidence: from CUT on, until the next round's."""
        return self.round == number and self.phase >= Phase.CUT

    def encode(self) -> bytes:
        """The fixed layout, 108 bytes; `shards` travels beside it."""
        return _LAYOUT.pack(
            _MAGIC,
            self.phase,
            self.flags,
            self.run,
            self.round,
            self.work,
            self.root,
            self.roster,
            self.weights,
            self.have,
        )

    @classmethod
    def decode(cls, raw: bytes | None, shards: bytes = b"") -> Record | None:
        """The record in `raw`, or None when these bytes are something else (another subnet's, a human's).

        A second field that is no row of shard digests is nobody's, and read as empty.
        """
        if raw is None or len(raw) != _LAYOUT.size or not raw.startswith(_MAGIC):
            return None
        _, phase, flags, run, number, work, root, roster, weights, have = _LAYOUT.unpack(raw)
        if phase > Phase.DONE:
            return None
        return cls(
            run=run,
            round=number,
            phase=Phase(phase),
            flags=flags,
            work=work,
            root=root,
            roster=roster,
            weights=weights,
            have=have,
            shards=shards if len(shards) <= SHARDS_LIMIT and len(shards) % SHARD_DIGEST_BYTES == 0 else b"",
        )


def bind_roots(payload: bytes, evidence: bytes) -> bytes:
    """One hash that fixes both the payload's and the evidence's root (32 bytes each)."""
    return hashlib.sha256(b"orion/root/1" + payload + evidence).digest()
