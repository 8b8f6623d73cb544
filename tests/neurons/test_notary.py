"""Heads from a miner to a validator and its word back: what counts in time, what is refused, what is kept as proof."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from neurons.journal import PAUSE, Journal
from neurons.node import Node
from neurons.notary import STATEMENTS_LIMIT, WINDOWS_LIMIT, Notary
from neurons.wire import byte_tensor
from subnet.identity import Identity, verify
from subnet.messages import Acknowledged, Heads
from subnet.metagraph import ChainState, Head, Neuron
from subnet.swarm.record import Flags, Phase, Record
from subnet.swarm.roster import Roster
from subnet.transport.errors import BadSignature, Dropped, UnknownRun, Unreachable
from subnet.trust.heads import HEAD_BYTES, WindowHead, ack_message, acknowledged, chain, conflicting, statement_message
from tests.virtual import run

RUN = b"a run id"
MINER, OTHER = Identity.from_uri("//miner"), Identity.from_uri("//other")
VALIDATORS = {identity.hotkey: identity for identity in (Identity.from_uri(f"//validator-{i}") for i in range(3))}
SLOT, GRACE, CLOSE = 10, 3, 16
BLOCK = 100


def head(version: int, *, slot: int = 0, weights: bytes = bytes(32)) -> WindowHead:
    return WindowHead(
        version=version,
        steps=version,
        slot=slot,
        forward=1,
        backward=1,
        merged=0,
        weights=weights,
        optimizer=bytes(32),
        units=bytes(32),
        next_weights=bytes(32),
        next_optimizer=bytes(32),
    )


@dataclass
class World:
    """A chain that stands still until told, and the notaries that are there."""

    roster: Roster = field(default_factory=lambda: replace(Roster.of([[MINER.hotkey], [OTHER.hotkey]]), block=BLOCK))
    block: int = BLOCK
    moved: asyncio.Event = field(default_factory=asyncio.Event)
    notaries: dict[str, Notary] = field(default_factory=dict)
    down: set[str] = field(default_factory=set)
    pushes: int = 0

    def advance(self, block: int) -> None:
        self.block = block
        self.moved.set()
        self.moved = asyncio.Event()

    async def wait(self, block: int) -> None:
        while self.block < block:
            await self.moved.wait()

    async def finalized(self) -> Head:
        return Head(self.block, "0x00", 0)

    async def state_at(self, number: int) -> ChainState:
        record = Record(run=RUN, round=0, phase=Phase.READY, flags=Flags.OBSERVER).encode()
        neurons = tuple(
            Neuron(
                uid=uid,
                hotkey=hotkey,
                coldkey=hotkey,
                stake=1.0,
                validator_permit=True,
                endpoint=None,
                registered_at=0,
                last_update=0,
                incentive=0.0,
                dividends=0.0,
                record=record,
                record_block=0,
            )
            for uid, hotkey in enumerate(self.notaries)
        )
        return ChainState(Head(number, "0x00", 0), 9, "owner", 20, neurons)

    def node(self, identity: Identity) -> Node:
        manifest = SimpleNamespace(
            audit=SimpleNamespace(slot=SLOT, grace=GRACE), round=SimpleNamespace(close=CLOSE, cut=CLOSE + 6)
        )
        node = SimpleNamespace(
            identity=identity,
            loaded=SimpleNamespace(run_id=RUN, manifest=manifest),
            history=SimpleNamespace(roster=lambda number: self.roster if number == 0 else None),
            chain=self,
            neighbours=SimpleNamespace(endpoint=lambda hotkey: hotkey),
            state=self.state_at,
            dendrite=SimpleNamespace(call=lambda *a, **k: self.call(identity.hotkey, *a, **k)),
            wait=self.wait,
        )
        return cast("Node", node)

    def validate(self, *hotkeys: str) -> list[Notary]:
        self.notaries = {hotkey: Notary(self.node(VALIDATORS[hotkey])) for hotkey in hotkeys}
        return list(self.notaries.values())

    async def call(
        self,
        caller: str,
        endpoint: str,
        hotkey: str,
        message: Heads,
        tensors: Mapping[str, torch.Tensor],
        **_: object,
    ) -> tuple[Acknowledged, dict[str, torch.Tensor]]:
        self.pushes += 1
        await asyncio.sleep(0.01)
        if hotkey in self.down:
            raise Unreachable(f"{endpoint} does not answer")
        return await self.notaries[hotkey].heads(caller, message, tensors)


def message(
    heads: list[WindowHead], *, first: int = 0, signer: Identity = MINER, **changes: object
) -> tuple[Heads, dict[str, torch.Tensor]]:
    digest = chain(heads)[-1]
    word = statement_message(RUN, 0, hotkey=signer.hotkey, count=len(heads), digest=digest)
    fields: dict[str, object] = {
        "run": RUN.hex(),
        "round": 0,
        "stage": 0,
        "first": first,
        "count": len(heads) - first,
        "digest": digest.hex(),
        "signature": signer.sign(word).hex(),
    }
    table = b"".join(entry.encode() for entry in heads[first:])
    return Heads.model_validate(fields | changes), {"heads": byte_tensor(table).view(-1, HEAD_BYTES)}


FIRST = next(iter(VALIDATORS))


async def test_heads_are_acknowledged_for_the_open_slot_and_again_for_the_same_word() -> None:
    world = World()
    (notary,) = world.validate(FIRST)
    heads = [head(0), head(1)]
    for _ in range(2):
        reply, _ = await notary.heads(MINER.hotkey, *message(heads))
        said = ack_message(RUN, 0, hotkey=MINER.hotkey, count=2, digest=chain(heads)[-1], slot=0)
        assert (reply.count, reply.slot) == (2, 0)
        assert verify(FIRST, said, bytes.fromhex(reply.signature))
    world.advance(BLOCK + SLOT)
    late, _ = await notary.heads(MINER.hotkey, *message([*heads, head(2)], first=2))
    assert (late.count, late.slot) == (3, 1)
    assert notary.windows(0, MINER.hotkey) == (*heads, head(2))
    assert [statement.count for statement in notary.statements(0, MINER.hotkey)] == [3]


async def test_a_gap_is_answered_by_how_far_the_chain_is_here() -> None:
    (notary,) = World().validate(FIRST)
    reply, _ = await notary.heads(MINER.hotkey, *message([head(0), head(1)], first=1))
    assert reply.count == 0
    assert notary.windows(0, MINER.hotkey) == ()


async def test_two_chains_of_one_round_are_refused_and_one_of_them_contradicts_the_ledger() -> None:
    (notary,) = World().validate(FIRST)
    told, other = [head(0), head(1)], [head(0), head(1, weights=b"x" * 32)]
    await notary.heads(MINER.hotkey, *message(told))
    for _ in range(STATEMENTS_LIMIT + 3):
        with pytest.raises(Dropped, match="another chain"):
            await notary.heads(MINER.hotkey, *message(other, first=1))
    statements = notary.statements(0, MINER.hotkey)
    assert len(statements) <= STATEMENTS_LIMIT + 1
    assert conflicting(told, statements) is not None
    assert conflicting(other, statements) is not None
    assert conflicting(told, statements[:1]) is None
    assert conflicting(told[:1], statements[:1]) is not None  # what was acknowledged may not be left out


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"run": "00" * 8}, UnknownRun),
        ({"round": 1}, Dropped),
        ({"stage": 1}, Dropped),
        ({"signature": "00" * 64}, BadSignature),
        ({"digest": "11" * 32}, BadSignature),
        ({"first": WINDOWS_LIMIT}, BadSignature),
    ],
)
async def test_what_is_not_ones_own_is_refused(changes: dict[str, object], error: type[Exception]) -> None:
    (notary,) = World().validate(FIRST)
    sent, tensors = message([head(0)])
    with pytest.raises(error):
        await notary.heads(MINER.hotkey, sent.model_copy(update=changes), tensors)
    assert notary.statements(0, MINER.hotkey) == ()


async def test_strangers_other_signers_and_windows_of_the_future_are_refused() -> None:
    (notary,) = World().validate(FIRST)
    with pytest.raises(Dropped, match="no replica"):
        await notary.heads(Identity.from_uri("//stranger").hotkey, *message([head(0)]))
    with pytest.raises(BadSignature):
        await notary.heads(MINER.hotkey, *message([head(0)], signer=OTHER))
    with pytest.raises(Dropped, match="slot 2"):
        await notary.heads(MINER.hotkey, *message([head(0, slot=2)]))
    sent, _ = message([head(0)])
    with pytest.raises(Dropped, match="do not lead"):
        await notary.heads(MINER.hotkey, sent, message([head(0, weights=b"y" * 32)])[1])


async def test_a_round_that_is_forgotten_takes_nothing_more() -> None:
    (notary,) = World().validate(FIRST)
    await notary.heads(MINER.hotkey, *message([head(0)]))
    notary.forget(1)
    assert notary.statements(0, MINER.hotkey) == ()
    with pytest.raises(Dropped, match="not open"):
        await notary.heads(MINER.hotkey, *message([head(0)]))


def test_a_journal_has_most_of_the_stakes_word_though_one_validator_is_dead() -> None:
    async def whole() -> None:
        world = World()
        world.validate(*VALIDATORS)
        dead = min(VALIDATORS)
        world.down.add(dead)
        journal = Journal(world.node(MINER), world.roster, 0)
        following = asyncio.create_task(journal.run())
        await asyncio.sleep(0.1)
        heads = []
        for version in range(5):
            heads.append(head(version, slot=journal.slot()))
            journal.entered(heads[-1])
            if version == 2:
                world.advance(BLOCK + SLOT - GRACE)
            await asyncio.sleep(0.1)
        assert [entry.slot for entry in heads] == [0, 0, 0, 1, 1]
        world.advance(BLOCK + CLOSE)
        settling = asyncio.create_task(journal.settle())
        await asyncio.sleep(0.1)
        assert not settling.done()  # one validator's word is missing, and there is time for it
        world.advance(BLOCK + CLOSE + 2)
        acks = await settling
        following.cancel()
        stakes = dict.fromkeys(VALIDATORS, 1.0)
        assert {ack.validator for ack in acks} == set(VALIDATORS) - {dead}
        assert acknowledged(heads, acks, stakes) == (True,) * 5
        assert acknowledged(heads, acks[:1], stakes) == (False,) * 5

    run(whole())


def test_a_validator_that_comes_back_gets_all_heads_in_one_push() -> None:
    async def whole() -> None:
        world = World()
        world.validate(FIRST)
        world.down.add(FIRST)
        journal = Journal(world.node(MINER), world.roster, 0)
        following = asyncio.create_task(journal.run())
        for version in range(4):
            journal.entered(head(version))
            await asyncio.sleep(0.1)
        world.down.clear()
        before = world.pushes
        await asyncio.sleep(2 * PAUSE)
        assert world.pushes == before + 1
        assert journal.acknowledged == 4
        (ack,) = await journal.settle()
        assert (ack.count, ack.slot) == (4, 0)
        following.cancel()

    run(whole())
