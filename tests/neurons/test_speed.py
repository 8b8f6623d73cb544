"""Transfers that are only timed: for registered hotkeys, of a largest size, and few."""

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import ClassVar

import pytest
import torch

from neurons import speed
from neurons.node import Neighbourhood
from neurons.speed import SpeedDesk
from subnet.identity import Identity
from subnet.messages import SPEED_BYTES, Sped, Speed
from subnet.swarm.roster import Roster
from subnet.transport import auth, http1, protocol, synapse
from subnet.transport.admission import Admission
from subnet.transport.axon import Axon
from subnet.transport.dendrite import Dendrite
from subnet.transport.digests import Digests
from subnet.transport.errors import Busy, MalformedRequest, OverQuota, TooLarge, UnknownHotkey
from subnet.transport.protocol import PROTOCOL
from subnet.transport.synapse import HEADER_LIMIT, Synapse
from tests.subnet.swarm.histories import neuron, state
from tests.virtual import run

ALICE, BOB, PEER = (Identity.from_uri(f"//{name}") for name in ("Alice", "Bob", "Peer"))


def anybody(_hotkey: str, _route: str) -> None:
    return


@asynccontextmanager
async def peer(allow: Callable[[str, str], None] = anybody) -> AsyncIterator[Axon]:
    axon = Axon(Admission(PEER.hotkey, allow=allow, now_ns=time.time_ns))
    SpeedDesk().open(axon)
    await axon.start()
    try:
        yield axon
    finally:
        await axon.stop()


async def carry(axon: Axon, caller: Identity, message: Synapse, *, body: int) -> int:
    """Bytes that came back."""
    async with Dendrite(caller, now_ns=time.time_ns) as dendrite:
        data = torch.zeros(1, body, dtype=torch.uint8)
        _, tensors = await dendrite.call(
            axon.endpoint,
            PEER.hotkey,
            message,
            {"data": data},
            reply=Sped,
            reply_specs=Sped.specs,
            max_reply_bytes=HEADER_LIMIT + SPEED_BYTES,
            deadline=20,
        )
        return tensors["data"].numel()


async def test_as_much_comes_back_as_was_asked_for() -> None:
    async with peer() as axon:
        assert await carry(axon, ALICE, Speed(up=1000, down=0), body=1000) == 0
        assert await carry(axon, ALICE, Speed(up=0, down=SPEED_BYTES), body=0) == SPEED_BYTES


class Greedy(Synapse):
    """A request for more than there is."""

    route: ClassVar[str] = "speed"
    up: int
    down: int


async def test_more_than_the_largest_size_is_refused_either_way() -> None:
    async with peer() as axon:
        with pytest.raises(MalformedRequest, match="down"):
            await carry(axon, ALICE, Greedy(up=0, down=SPEED_BYTES + 1), body=0)
        with pytest.raises(TooLarge):
            await carry(axon, ALICE, Greedy(up=2 * SPEED_BYTES, down=0), body=2 * SPEED_BYTES)


async def test_a_hotkey_that_is_not_registered_is_refused() -> None:
    around = Neighbourhood()
    registered = state([dataclasses.replace(neuron(0), hotkey=ALICE.hotkey)])
    around.relocate(registered)
    async with peer(around.allow) as axon:
        assert await carry(axon, ALICE, Speed(up=0, down=8), body=0) == 8  # before the first roster
        with pytest.raises(Busy, match="roster is not known"):
            await carry(axon, BOB, Speed(up=0, down=8), body=0)
        around.update(Roster.of([[ALICE.hotkey]]), registered)
        with pytest.raises(UnknownHotkey, match="may not use speed"):
            await carry(axon, BOB, Speed(up=0, down=8), body=0)


async def test_who_is_over_its_quota_is_refused_before_the_body_is_read() -> None:
    async with peer() as axon:
        for _ in range(speed.TRIES):
            await carry(axon, ALICE, Speed(up=8, down=0), body=8)
        with pytest.raises(OverQuota, match=f"limits {speed.TRIES} and {speed.ALL}"):
            await carry(axon, ALICE, Speed(up=8, down=0), body=8)
        parts = synapse.encode(Speed(up=SPEED_BYTES, down=0), {"data": torch.zeros(1, SPEED_BYTES, dtype=torch.uint8)})
        path = protocol.target("speed", PROTOCOL)
        signed = auth.sign(ALICE, path=path, digests=Digests.of(parts), receiver=PEER.hotkey, nonce_ns=time.time_ns())
        fields = {"Host": "peer", "Content-Length": str(synapse.size_of(parts)), **signed}
        reader, writer = await asyncio.open_connection("127.0.0.1", axon.port)
        writer.write(http1.request("POST", path, fields))  # and nothing after it
        assert b" 403 " in await reader.readline()
        writer.close()
        assert await carry(axon, BOB, Speed(up=0, down=8), body=0) == 8


def test_the_quota_holds_for_each_and_for_all_and_comes_back() -> None:
    async def asked(desk: SpeedDesk, caller: str) -> bool:
        try:
            desk.grant(caller)
        except OverQuota:
            return False
        return True

    async def scene() -> None:
        desk = SpeedDesk()
        assert [await asked(desk, "a") for _ in range(speed.TRIES + 1)] == [True] * speed.TRIES + [False]
        others = [await asked(desk, f"b{number}") for number in range(speed.ALL)]
        assert others.count(True) == speed.ALL - speed.TRIES
        await asyncio.sleep(speed.PERIOD - 1)
        assert not await asked(desk, "c")
        await asyncio.sleep(1)
        assert await asked(desk, "a")

    run(scene())
