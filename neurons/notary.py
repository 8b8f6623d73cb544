"""The notary: a validator's record of the window heads that miners push, and its word that it had them in time.

Per miner and round it keeps one chain of heads. What is signed twice with different content is kept, both ways: one of
the two contradicts the closed ledger later. Its word names the slot that was open by its own view of the chain, so a
late head is acknowledged for a later slot, where it counts nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from neurons.node import Node
from subnet.identity import verify
from subnet.messages import HEADS_LIMIT, Acknowledged, Heads
from subnet.transport.errors import BadSignature, Dropped, UnknownRun
from subnet.transport.synapse import HEADER_LIMIT, tensor_bytes
from subnet.trust.heads import (
    HEAD_BYTES,
    START,
    Statement,
    WindowHead,
    ack_message,
    extend,
    parse_heads,
    slot_of,
    statement_message,
)

log = logging.getLogger("orion.neurons.notary")

WINDOWS_LIMIT = 4096
"""Windows of one miner in one round: some thirty times what a round has."""
STATEMENTS_LIMIT = 8
"""Contradicting statements kept of one miner in one round; one convicts."""
AHEAD = 1
"""Slots by which a miner's chain may be ahead of this validator's."""


@dataclass
class _Book:
    """One miner in one round."""

    heads: list[WindowHead] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=lambda: [START])
    newest: Statement | None = None
    """The one over the whole chain here."""
    contradictions: list[Statement] = field(default_factory=list)


class Notary:
    """Serves `Heads`. `forget` what no round needs any more."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._books: dict[tuple[int, str], _Book] = {}
        self._oldest = 0

    def open(self) -> None:
        """Put its route on the axon."""
        limit = HEADER_LIMIT + HEADS_LIMIT * HEAD_BYTES
        self._node.axon.serve(Heads, self.heads, specs=lambda message: message.specs(), max_bytes=limit)

    def statements(self, number: int, hotkey: str) -> tuple[Statement, ...]:
        """What the miner signed in a round, as far as one statement does not follow from another."""
        book = self._books.get((number, hotkey))
        if book is None:
            return ()
        return (*((book.newest,) if book.newest is not None else ()), *book.contradictions)

    def windows(self, number: int, hotkey: str) -> tuple[WindowHead, ...]:
        """The heads that came."""
        book = self._books.get((number, hotkey))
        return tuple(book.heads) if book is not None else ()

    def forget(self, before: int) -> None:
        """Drop the rounds before this one; what comes of them is refused."""
        self._oldest = max(self._oldest, before)
        self._books = {key: book for key, book in self._books.items() if key[0] >= before}

    async def heads(
        self, caller: str, message: Heads, tensors: Mapping[str, torch.Tensor]
    ) -> tuple[Acknowledged, dict[str, torch.Tensor]]:
        """Take heads of the caller's windows, and say how many are here."""
        node = self._node
        run, number = node.loaded.run_id, message.round
        if message.run != run.hex():
            raise UnknownRun(f"run {message.run} is not {run.hex()}", "start with the manifest that is on chain")
        roster = node.history.roster(number)
        if roster is None or number < self._oldest:
            raise Dropped(f"round {number} is not open here", "push heads while their round goes on")
        if roster.stage_of(caller) != message.stage:
            raise Dropped(f"{caller} has no replica of stage {message.stage} in round {number}", "push own heads only")
        signature, digest = bytes.fromhex(message.signature), bytes.fromhex(message.digest)
        count = message.first + message.count
        word = statement_message(run, number, hotkey=caller, count=count, digest=digest)
        if not verify(caller, word, signature):
            raise BadSignature(f"the statement over {count} windows is not signed by {caller}", "sign with the hotkey")
        finalized = (await node.chain.finalized()).number
        slot = slot_of(max(0, finalized - roster.block), node.loaded.manifest.audit.slot)
        book = self._books.setdefault((number, caller), _Book())
        heads = parse_heads(bytes(tensor_bytes(tensors["heads"])))
        self._enter(book, message.first, heads, Statement(count, digest, signature), slot)
        held = len(book.heads)
        said = ack_message(run, number, hotkey=caller, count=held, digest=book.digests[held], slot=slot)
        return Acknowledged(count=held, slot=slot, signature=node.identity.sign(said).hex()), {}

    @staticmethod
    def _enter(book: _Book, first: int, heads: tuple[WindowHead, ...], statement: Statement, slot: int) -> None:
        """Lengthen the chain by what is new. A gap changes nothing: the answer says how far the chain is here."""
        if first > len(book.heads):
            return
        if statement.count > WINDOWS_LIMIT or any(head.slot > slot + AHEAD for head in heads):
            raise Dropped(
                f"{statement.count} windows up to slot {heads[-1].slot} in slot {slot}, limit {WINDOWS_LIMIT}",
                "push heads when their windows close",
            )
        digests = [book.digests[first]]
        for head in heads:
            digests.append(extend(digests[-1], head))
        if digests[-1] != statement.digest:
            raise Dropped("the heads do not lead to the digest that was signed", "send the chain that was signed")
        common = min(len(book.digests) - first, len(digests))
        if book.digests[first : first + common] != digests[:common]:
            if len(book.contradictions) < STATEMENTS_LIMIT:
                book.contradictions.append(statement)
            raise Dropped("another chain of this round was signed before", "a window has one head")
        new = heads[common - 1 :]
        if new:
            book.heads.extend(new)
            book.digests.extend(digests[common:])
            book.newest = statement
