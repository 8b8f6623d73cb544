"""Large bodies follow each other on one connection; what ends that costs the others one more try, not their answer."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import ClassVar

import numpy as np
import pytest
import torch

from subnet.identity import Identity
from subnet.transport import auth
from subnet.transport.admission import Admission
from subnet.transport.axon import Axon, _Request
from subnet.transport.dendrite import Dendrite
from subnet.transport.errors import Dropped, Silent
from subnet.transport.shaping import Link, Shaper
from subnet.transport.synapse import Received, Synapse, TensorSpec, encode

ALICE, BOB = Identity.from_uri("//Alice"), Identity.from_uri("//Bob")
SPECS = {"x": TensorSpec(torch.float32, (128, 1024))}


class Body(Synapse):
    route: ClassVar[str] = "body"
    number: int


class Got(Synapse):
    number: int


class Desk:
    """Bob's axon: what came over which connection, and a gate for number 0."""

    def __init__(self, shaper: Shaper | None = None) -> None:
        self.axon = Axon(Admission(BOB.hotkey, allow=lambda _hotkey, _route: None, now_ns=time.time_ns), shaper=shaper)
        self.axon.serve(Body, self.body, specs=SPECS)
        self.seen: list[int] = []
        self.peers: list[str] = []
        self.gate = asyncio.Event()
        self.came = asyncio.Event()
        accept = self.axon._on_request

        async def watch(request: _Request) -> bool:
            self.peers.append(request.connection.peer)
            return await accept(request)

        self.axon._on_request = watch  # type: ignore[method-assign]

    async def body(self, _caller: str, message: Body, tensors: Received) -> tuple[Got, dict[str, torch.Tensor]]:
        assert float(tensors["x"][0, 0]) == message.number
        self.seen.append(message.number)
        self.came.set()
        if message.number == 0:
            await self.gate.wait()
        if message.number == 13:
            raise Dropped("13 is not wanted", "send another")
        return Got(number=message.number), {}


@pytest.fixture
async def desk() -> AsyncIterator[Desk]:
    made = Desk()
    await made.axon.start()
    yield made
    made.gate.set()
    await made.axon.stop()


@pytest.fixture
async def alice() -> AsyncIterator[Dendrite]:
    async with Dendrite(ALICE, now_ns=time.time_ns) as it:
        yield it


async def send(alice: Dendrite, desk: Desk, number: int, *, deadline: float = 20.0) -> int:
    x = torch.full((128, 1024), float(number))
    got, _ = await alice.call(
        desk.axon.endpoint, BOB.hotkey, Body(number=number), {"x": x}, reply=Got, deadline=deadline
    )
    return got.number


async def test_many_bodies_one_connection_and_each_its_own_answer(desk: Desk, alice: Dendrite) -> None:
    desk.gate.set()
    assert await asyncio.gather(*(send(alice, desk, number) for number in range(12))) == list(range(12))
    assert desk.seen == list(range(12))
    assert len(set(desk.peers)) == 1


async def test_the_next_leaves_before_the_answer_to_the_first(alice: Dendrite) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(2):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            await reader.readexactly(int(head.split("Content-Length: ")[1].split("\r\n")[0]))
        for number in range(2):
            blob = b"".join(encode(Got(number=number), {}))
            writer.write(b"HTTP/1.1 200 OK\r\nOrion-Protocol: 1\r\nContent-Length: %d\r\n\r\n" % len(blob) + blob)
        await reader.read()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        endpoint = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        x = {"x": torch.zeros(128, 1024)}
        calls = [alice.call(endpoint, BOB.hotkey, Body(number=n), x, reply=Got, deadline=20) for n in range(2)]
        assert [got.number for got, _ in await asyncio.gather(*calls)] == [0, 1]
        await alice.stop()


async def test_a_refused_body_leaves_the_line_as_it_is(desk: Desk, alice: Dendrite) -> None:
    ends = await asyncio.gather(*(send(alice, desk, number) for number in (1, 13, 2)), return_exceptions=True)
    assert [ends[0], ends[2]] == [1, 2]
    assert isinstance(ends[1], Dropped)
    assert len(set(desk.peers)) == 1


async def test_who_gives_up_costs_those_behind_one_more_try(desk: Desk, alice: Dendrite) -> None:
    first, *others = (asyncio.create_task(send(alice, desk, number)) for number in range(4))
    await desk.came.wait()
    first.cancel()
    assert await asyncio.gather(*others) == [1, 2, 3]
    assert len(set(desk.peers)) == 2


async def test_a_refusal_at_the_door_costs_those_behind_one_more_try(
    desk: Desk, alice: Dendrite, monkeypatch: pytest.MonkeyPatch
) -> None:
    sign, signed = auth.sign, []

    def late(*args: object, nonce_ns: int, **kwargs: object) -> dict[str, str]:
        signed.append(nonce_ns)
        old = 3600 * 10**9 if len(signed) == 1 else 0
        return sign(*args, nonce_ns=nonce_ns - old, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(auth, "sign", late)
    ends = await asyncio.gather(*(send(alice, desk, number) for number in (1, 2, 3)), return_exceptions=True)
    assert ends[1:] == [2, 3]
    assert "signed 36" in str(ends[0])


async def test_silence_ends_as_silence_for_all_that_wait(desk: Desk, alice: Dendrite) -> None:
    ends = await asyncio.gather(*(send(alice, desk, 0, deadline=0.2) for _ in range(3)), return_exceptions=True)
    assert isinstance(ends[0], Silent)
    assert all(isinstance(end, Exception) for end in ends)


async def test_a_deadline_begins_when_a_body_leaves() -> None:
    """Six bodies of 0.25 s each and 0.75 s for each of them: the last is there after 1.5 s."""
    link = Link(up_bps=8 * 128 * 1024 * 4 / 0.25)
    desk = Desk()
    await desk.axon.start()
    desk.gate.set()
    shaper = Shaper(link, np.random.default_rng(0))
    async with Dendrite(ALICE, now_ns=time.time_ns, shaper=shaper) as alice:
        found = await asyncio.gather(*(send(alice, desk, number, deadline=0.75) for number in range(6)))
    assert found == list(range(6))
    await desk.axon.stop()


async def test_a_line_that_was_closed_by_the_other_side_is_made_anew(desk: Desk, alice: Dendrite) -> None:
    assert await send(alice, desk, 1) == 1
    for connection in desk.axon._talks.values():
        connection.close()
    assert await send(alice, desk, 2) == 2
    assert len(set(desk.peers)) == 2
