"""The journal: what a miner tells validators of its windows while a round goes on, and their word that they had it.

A window that a validator acknowledges before its slot ends can no longer be changed, and no seed that picks windows of
the slot exists yet. Heads are pushed as they come, several at a time where a validator is slow, to every validator at
work. A slow or dead one delays nobody: what most of the stake at work acknowledged counts.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Sequence

import torch

from neurons.node import Node
from neurons.wire import byte_tensor
from subnet.chain import ChainError
from subnet.identity import verify
from subnet.messages import HEADS_LIMIT, Acknowledged, Heads
from subnet.swarm.observers import observers
from subnet.swarm.roster import Roster
from subnet.transport.errors import BadReply, TransportError, Unreachable
from subnet.trust.heads import (
    HEAD_BYTES,
    START,
    Ack,
    WindowHead,
    ack_message,
    extend,
    slot_end,
    slots_in,
    statement_message,
)

log = logging.getLogger("orion.neurons.journal")

PUSH_DEADLINE = 10.0
PAUSE = 0.5
"""Seconds until a validator that could not be reached is tried again."""
PATIENCE = 3
"""One part in so many of the time between the end of training and CUT is given to the last acknowledgements."""
LATECOMERS = 5
"""Blocks after a round's start at which validators are looked for again: by then they have said that they are there."""


class Journal:
    """One round of one replica. `run` it beside training; `settle` ends it."""

    def __init__(self, node: Node, roster: Roster, stage: int) -> None:
        self._node = node
        self._roster = roster
        self._stage = stage
        self._slot = 0
        self._heads: list[WindowHead] = []
        self._digests = [START]
        self._news: dict[str, asyncio.Event] = {}
        self._counts: dict[str, int] = {}
        """Heads that each validator has acknowledged."""
        self._acks: dict[tuple[str, int], Ack] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._complete = asyncio.Event()

    def slot(self) -> int:
        """The slot that a window which closes now belongs to."""
        return self._slot

    def entered(self, head: WindowHead) -> None:
        """A window has been closed: tell everybody."""
        self._heads.append(head)
        self._digests.append(extend(self._digests[-1], head))
        self._complete.clear()
        for news in self._news.values():
            news.set()

    async def run(self) -> None:
        """Follow the chain: which slot it is, and which validators are at work. Until cancelled."""
        node, rules = self._node, self._node.loaded.manifest
        await self._look()
        await node.wait(self._roster.block + LATECOMERS)
        await self._look()
        slots = slots_in(rules.round.close, rules.audit.slot, rules.audit.grace)
        for slot in range(1, slots):
            await node.wait(self._roster.block + slot_end(slot - 1, rules.audit.slot) - rules.audit.grace)
            self._slot = slot
            await self._look()

    async def settle(self) -> tuple[Ack, ...]:
        """Wait until every validator has acknowledged everything, a few blocks at most; what they have said."""
        marks = self._node.loaded.manifest.round
        last = self._roster.block + marks.close + (marks.cut - marks.close) // PATIENCE
        ended = asyncio.create_task(self._node.wait(last))
        complete = asyncio.create_task(self._complete.wait())
        try:
            if self._news and self._heads:
                await asyncio.wait([ended, complete], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (ended, complete, *self._tasks):
                task.cancel()
            await asyncio.gather(ended, complete, *self._tasks, return_exceptions=True)
        return tuple(self._acks.values())

    @property
    def acknowledged(self) -> int:
        """Windows that every validator at work has acknowledged."""
        return min(self._counts.values(), default=0)

    async def _look(self) -> None:
        try:
            state = await self._node.state((await self._node.chain.finalized()).number)
        except ChainError as error:
            log.warning("round %d: validators at work are not known: %s", self._roster.round, error)
            return
        self._tell(hotkey for hotkey in observers(state, self._node.loaded.run_id) if hotkey not in self._news)

    def _tell(self, validators: Iterable[str]) -> None:
        for hotkey in validators:
            self._news[hotkey], self._counts[hotkey] = asyncio.Event(), 0
            self._news[hotkey].set()
            self._tasks.append(asyncio.create_task(self._push(hotkey)))

    async def _push(self, hotkey: str) -> None:
        while True:
            news = self._news[hotkey]
            await news.wait()
            news.clear()
            try:
                while self._counts[hotkey] < len(self._heads):
                    await self._offer(hotkey)
            except TransportError as error:
                log.info("round %d: heads to %s: %s", self._roster.round, hotkey, error)
                await asyncio.sleep(PAUSE)
                news.set()

    async def _offer(self, hotkey: str) -> None:
        """One push, and the validator's word for it. Raises `TransportError`."""
        node, first = self._node, self._counts[hotkey]
        batch = self._heads[first : first + HEADS_LIMIT]
        count = first + len(batch)
        digest = self._digests[count]
        run, number = node.loaded.run_id, self._roster.round
        endpoint = node.neighbours.endpoint(hotkey)
        if endpoint is None:
            raise Unreachable(f"{hotkey} serves no axon at the last finalized block")
        word = statement_message(run, number, hotkey=node.identity.hotkey, count=count, digest=digest)
        message = Heads(
            run=run.hex(),
            round=number,
            stage=self._stage,
            first=first,
            count=len(batch),
            digest=digest.hex(),
            signature=node.identity.sign(word).hex(),
        )
        tensors = {"heads": _table(batch)}
        reply, _ = await node.dendrite.call(
            endpoint, hotkey, message, tensors, reply=Acknowledged, deadline=PUSH_DEADLINE
        )
        if reply.count >= len(self._digests):
            raise BadReply(f"{hotkey} acknowledges {reply.count} windows of {len(self._heads)}")
        signature = bytes.fromhex(reply.signature)
        said = ack_message(
            run,
            number,
            hotkey=node.identity.hotkey,
            count=reply.count,
            digest=self._digests[reply.count],
            slot=reply.slot,
        )
        if not verify(hotkey, said, signature):
            raise BadReply(f"{hotkey} acknowledged something else than it was sent")
        self._counts[hotkey] = reply.count
        held = self._acks.get((hotkey, reply.slot))
        if held is None or held.count < reply.count:
            self._acks[hotkey, reply.slot] = Ack(hotkey, reply.count, reply.slot, signature)
        if min(self._counts.values()) == len(self._heads):
            self._complete.set()
        if reply.count < count:  # it has fewer than it was told to have: from there on again
            await asyncio.sleep(PAUSE)


def _table(heads: Sequence[WindowHead]) -> torch.Tensor:
    return byte_tensor(b"".join(head.encode() for head in heads)).view(-1, HEAD_BYTES)
