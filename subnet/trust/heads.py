"""Window heads: what a replica states about each of its local steps, before anybody knows which will be audited.

A *window* is one local step of one replica. Its head binds, by their roots, the weights and the optimizer state it
began with, the units computed with them, and both states after the step. Heads of a round form a hash chain; the miner
signs the chain's digest after each window and pushes it to the validators, who acknowledge it. A round's training is
divided into *slots* of blocks; a window belongs to the slot its head names, a head counts in a slot only if it was
acknowledged before the slot's end, and the seed that picks windows of a slot is younger than that. So what is picked
can no longer be changed, and what is not picked may be forgotten. Two signed digests for one number of windows, or a
closed chain that a signed digest is no prefix of, convict.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

_HEAD = struct.Struct("<IIHIII32s32s32s32s32s")
HEAD_BYTES = _HEAD.size
_ACK = struct.Struct("<48sIH64s")
ACK_BYTES = _ACK.size
START = bytes(32)
"""Digest of a chain without windows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowHead:
    """One local step. Roots are those of `subnet.trust.tree` over flat fp32 vectors in name order."""

    version: int
    """Names the weights its units were computed with, as their leaves do."""
    steps: int
    """Optimizer steps done before it: what the learning rate is a function of."""
    slot: int
    forward: int
    """Forward units."""
    backward: int
    """Backward units; 0 in a window that ended without a step."""
    merged: int
    """Rounds merged into the public state that was taken over just before it; 0 where none was."""
    weights: bytes
    optimizer: bytes
    """Of the moments, one after the other, see `model.engine`."""
    units: bytes
    """Hash of its leaves without their receipts, see `subnet.trust.ledger.units_hash`."""
    next_weights: bytes
    """After its step, before anything is taken over from a merge."""
    next_optimizer: bytes

    @property
    def idle(self) -> bool:
        """Whether it ends as it began: without a step."""
        return (self.next_weights, self.next_optimizer) == (self.weights, self.optimizer)

    def encode(self) -> bytes:
        return _HEAD.pack(
            self.version,
            self.steps,
            self.slot,
            self.forward,
            self.backward,
            self.merged,
            self.weights,
            self.optimizer,
            self.units,
            self.next_weights,
            self.next_optimizer,
        )


def parse_heads(table: bytes | memoryview) -> tuple[WindowHead, ...]:
    """Rows back to heads. Raises `ValueError` unless they are whole rows."""
    if len(table) % HEAD_BYTES:
        raise ValueError(f"a table of {len(table)} bytes is not whole heads of {HEAD_BYTES}")
    names = ("version", "steps", "slot", "forward", "backward", "merged")
    roots = ("weights", "optimizer", "units", "next_weights", "next_optimizer")
    return tuple(WindowHead(**dict(zip(names + roots, row, strict=True))) for row in _HEAD.iter_unpack(table))


def extend(digest: bytes, head: WindowHead) -> bytes:
    """The chain's digest with one window more."""
    return hashlib.sha256(b"orion/heads/1" + digest + head.encode()).digest()


def chain(heads: Iterable[WindowHead]) -> tuple[bytes, ...]:
    """The digests of the chain: before the first window and after each."""
    digests = [START]
    for head in heads:
        digests.append(extend(digests[-1], head))
    return tuple(digests)


def statement_message(run: bytes, number: int, *, hotkey: str, count: int, digest: bytes) -> bytes:
    """What a miner signs: after `count` windows of round `number` its chain has this digest."""
    return b"orion/statement/1" + run + struct.pack("<II", number, count) + digest + hotkey.encode()


def ack_message(run: bytes, number: int, *, hotkey: str, count: int, digest: bytes, slot: int) -> bytes:
    """What a validator signs: it had `hotkey`'s first `count` heads, with this digest, before the end of `slot`."""
    return b"orion/ack/1" + run + struct.pack("<IIH", number, count, slot) + digest + hotkey.encode()


@dataclass(frozen=True, slots=True)
class Statement:
    """A signed chain digest: the miner's word."""

    count: int
    digest: bytes
    signature: bytes


@dataclass(frozen=True, slots=True)
class Ack:
    """A validator's word that it had the first `count` heads before the end of `slot`."""

    validator: str
    count: int
    slot: int
    signature: bytes

    def encode(self) -> bytes:
        return _ACK.pack(self.validator.encode(), self.count, self.slot, self.signature)


def parse_acks(table: bytes | memoryview) -> tuple[Ack, ...]:
    """Rows back to acknowledgements. Raises `ValueError` unless they are whole rows of ASCII hotkeys."""
    if len(table) % ACK_BYTES:
        raise ValueError(f"a table of {len(table)} bytes is not whole acknowledgements of {ACK_BYTES}")
    return tuple(
        Ack(validator.rstrip(b"\x00").decode("ascii"), count, slot, signature)
        for validator, count, slot, signature in _ACK.iter_unpack(table)
    )


def conflicting(heads: Sequence[WindowHead], statements: Iterable[Statement]) -> Statement | None:
    """The first signed statement that the closed chain of the same round contradicts, if there is one.

    One that counts more windows than the closed chain has contradicts it too: an acknowledged window was left out.
    """
    digests = chain(heads)
    for statement in statements:
        if statement.count >= len(digests) or digests[statement.count] != statement.digest:
            return statement
    return None


def acknowledged(heads: Sequence[WindowHead], acks: Iterable[Ack], stakes: Mapping[str, float]) -> tuple[bool, ...]:
    """By window: whether validators with more than half of `stakes` (those at work) had its head before its slot ended.

    The acknowledgements' signatures are checked by the caller.
    """
    whole = sum(stakes.values())
    have: list[set[str]] = [set() for _ in heads]
    for ack in acks:
        for index in range(min(ack.count, len(heads))):
            if ack.slot <= heads[index].slot and ack.validator in stakes:
                have[index].add(ack.validator)
    return tuple(sum(stakes[name] for name in names) * 2 > whole for names in have)


def slot_of(offset: int, slot_blocks: int) -> int:
    """The slot of a block, `offset` blocks after the round's first."""
    return offset // slot_blocks


def slots_in(close: int, slot_blocks: int, grace: int) -> int:
    """Slots of a round whose training ends at block `close`: a window of the last block still has one to lie in."""
    return slot_of(close + grace, slot_blocks) + 1


def slot_end(slot: int, slot_blocks: int) -> int:
    """The last block of a slot, in blocks after the round's first. The slot's seed is of a later one."""
    return (slot + 1) * slot_blocks - 1
