"""Axon and dendrite over real loopback sockets with real signatures: what works, and all that is refused."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
from bittensor.sp_core import Keypair

from subnet.transport import auth, synapse
from subnet.transport.admission import Admission, ReplayCache
from subnet.transport.axon import Axon, Handler, _Request
from subnet.transport.crowd import Crowd
from subnet.transport.dendrite import Dendrite
from subnet.transport.digests import Digests, Running
from subnet.transport.errors import (
    BadReply,
    Broken,
    Busy,
    Dropped,
    NotFinite,
    PortTaken,
    Refused,
    ReplayedRequest,
    StaleRequest,
    TooLarge,
    Unavailable,
    UnknownHotkey,
    UnknownRoute,
    UnknownRun,
    Unreachable,
    WrongReceiver,
    WrongTensor,
)
from subnet.transport.protocol import PROTOCOL, package_version
from subnet.transport.synapse import Synapse, TensorSpec

ALICE = Keypair.create_from_uri("//Alice")
BOB = Keypair.create_from_uri("//Bob")
EVE = Keypair.create_from_uri("//Eve")
BOB_KEY = BOB.ss58_address
RUN = "run-1"
SPECS = {"x": TensorSpec(torch.float32, (8, 4))}
BIG = {"x": TensorSpec(torch.bfloat16, (1024, 2048))}  # 4 MiB: streamed both ways


class Push(Synapse):
    route: ClassVar[str] = "push"
    sample: int
    run: str = RUN


class Bulk(Synapse):
    route: ClassVar[str] = "bulk"


class Unserved(Synapse):
    route: ClassVar[str] = "unserved"


class Done(Synapse):
    sample: int = 0


@dataclass
class Node:
    """Bob's axon, what reached its handlers, and a gate that holds them back when closed."""

    axon: Axon
    seen: list[tuple[str, int]] = field(default_factory=list)
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    entered: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(0))

    async def push(
        self, caller: str, message: Push, tensors: dict[str, torch.Tensor]
    ) -> tuple[Done, dict[str, torch.Tensor]]:
        if message.run != RUN:
            raise UnknownRun(f"run {message.run!r}, this node trains {RUN!r}", "load the manifest on chain")
        if message.sample < 0:
            raise Dropped(f"sample {message.sample} is of a past round", "do not send it again")
        if message.sample == 13:
            raise ZeroDivisionError("unlucky")
        synapse.require_finite(tensors)
        self.seen.append((caller, message.sample))
        self.entered.release()
        await self.gate.wait()
        return Done(sample=message.sample), {"x": tensors["x"] * 2}

    async def bulk(
        self, _caller: str, _message: Bulk, tensors: dict[str, torch.Tensor]
    ) -> tuple[Done, dict[str, torch.Tensor]]:
        self.entered.release()
        await self.gate.wait()
        return Done(), {"x": tensors["x"] + 1}


def rule(hotkey: str, route: str) -> None:
    if hotkey == EVE.ss58_address:
        raise UnknownHotkey(f"{hotkey} is no neighbour of this stage", "register on subnet 9")


@contextlib.asynccontextmanager
async def running(
    *,
    slots: int = 4,
    buffer_bytes: int = 1 << 28,
    grace_s: float = 5.0,
    min_rate: float = 125_000.0,
    idle_s: float = 120.0,
    crowd: Crowd[asyncio.Task[None]] | None = None,
) -> AsyncIterator[Node]:
    door = Admission(BOB_KEY, allow=rule, now_ns=time.time_ns, slots=slots, buffer_bytes=buffer_bytes)
    node = Node(Axon(door, grace_s=grace_s, min_rate=min_rate, idle_s=idle_s, crowd=crowd))
    node.gate.set()
    node.axon.serve(Push, node.push, specs=SPECS)
    node.axon.serve(Bulk, node.bulk, specs=BIG)
    await node.axon.start()
    try:
        yield node
    finally:
        node.gate.set()
        await node.axon.stop()


@pytest.fixture
async def node() -> AsyncIterator[Node]:
    async with running() as it:
        yield it


@pytest.fixture
async def alice() -> AsyncIterator[Dendrite]:
    async with Dendrite(ALICE, now_ns=time.time_ns) as it:
        yield it


def tensors() -> dict[str, torch.Tensor]:
    return {"x": torch.arange(32.0).view(8, 4)}


async def push(
    dendrite: Dendrite,
    node: Node,
    message: Synapse | None = None,
    values: dict[str, torch.Tensor] | None = None,
) -> tuple[Done, dict[str, torch.Tensor]]:
    return await dendrite.call(
        node.axon.endpoint,
        BOB_KEY,
        message or Push(sample=1),
        tensors() if values is None else values,
        reply=Done,
        reply_specs=SPECS,
        deadline=10,
    )


@dataclass
class Answer:
    status: int
    body: dict[str, object]
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter


async def read_answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, object]]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    length = int(head.split("content-length: ")[1].split("\r\n")[0])
    return int(head.split()[1]), json.loads(await reader.readexactly(length))


@contextlib.asynccontextmanager
async def raw(node: Node, request: bytes) -> AsyncIterator[Answer]:
    """The answer to hand-written bytes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", node.axon.port)
    try:
        writer.write(request)
        status, body = await read_answer(reader)
        yield Answer(status, body, reader, writer)
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


def hashed(body: memoryview) -> Digests:
    running = Running()
    running.update(body)
    return running.digests()


def head(
    body: bytes = b"", *, path: str = "/1/push", change: dict[str, str | None] | None = None, age_s: float = 0
) -> bytes:
    """Signed request line and headers for this body, some then changed or (None) left out."""
    headers: dict[str, str | None] = {
        **auth.sign(
            ALICE,
            path=path,
            digests=hashed(memoryview(body)),
            receiver=BOB_KEY,
            nonce_ns=time.time_ns() - int(age_s * 1e9),
        ),
        "Host": "bob",
        "Content-Length": str(len(body)),
    }
    lines = [f"{k}: {v}" for k, v in (headers | (change or {})).items() if v is not None]
    return "\r\n".join([f"POST {path} HTTP/1.1", *lines, "", ""]).encode()


async def test_round_trip_in_both_sizes(node: Node, alice: Dendrite) -> None:
    fields, got = await push(alice, node, Push(sample=5))
    assert fields == Done(sample=5)
    assert torch.equal(got["x"], tensors()["x"] * 2)
    assert node.seen == [(ALICE.ss58_address, 5)]
    x = torch.randn(1024, 2048, generator=torch.Generator().manual_seed(0)).bfloat16()
    _, got = await alice.call(node.axon.endpoint, BOB_KEY, Bulk(), {"x": x}, reply=Done, reply_specs=BIG, deadline=20)
    assert torch.equal(got["x"], x + 1)


async def test_counters_are_the_bytes_of_the_bodies(node: Node, alice: Dendrite) -> None:
    for sample in (1, 2):
        await push(alice, node, Push(sample=sample))
    with pytest.raises(Dropped):
        await push(alice, node, Push(sample=-1))
    size = synapse.size_of(synapse.encode(Push(sample=1), tensors()))
    traffic = alice.counters["push"]
    assert (traffic.calls, traffic.refused, traffic.failed) == (3, 1, 0)
    assert 3 * size <= traffic.sent <= 3 * size + 8  # "-1" may cost a padding unit
    assert traffic.received > 2 * synapse.wire_bytes(SPECS)


async def test_sequential_calls_use_one_connection_and_parallel_ones_several(node: Node, alice: Dendrite) -> None:
    ports: set[str] = set()
    accept = node.axon._on_request

    async def watch(request: _Request) -> bool:
        ports.add(request.connection.peer)
        return await accept(request)

    node.axon._on_request = watch  # type: ignore[method-assign]
    for sample in range(5):
        await push(alice, node, Push(sample=sample))
    assert len(ports) == 1
    with pytest.raises(Dropped):  # a refusal does not cost the connection
        await push(alice, node, Push(sample=-1))
    await asyncio.gather(*(push(alice, node, Push(sample=sample)) for sample in range(20, 40)))
    assert 1 < len(ports) <= alice.streams


async def test_health(node: Node) -> None:
    async with raw(node, b"GET /health HTTP/1.1\r\nHost: b\r\n\r\n") as answer:
        assert answer.status == 200
        assert answer.body == {
            "hotkey": BOB_KEY,
            "routes": ["bulk", "push"],
            "protocol": PROTOCOL,
            "orion": package_version(),
        }


@pytest.mark.parametrize(
    ("message", "values", "kind", "status", "told"),
    [
        (Push(sample=1), {"x": torch.zeros(4, 8)}, WrongTensor, 422, "F32[4, 8]"),
        (Push(sample=1), {"x": torch.zeros(8, 4).double()}, WrongTensor, 422, "F64[8, 4]"),
        (
            Push(sample=1),
            {"x": torch.zeros(8, 4).int()},
            WrongTensor,
            422,
            "plan says F32[8, 4] in 128 bytes",
        ),
        (Push(sample=1), {}, WrongTensor, 422, "send exactly ['x']"),
        (Push(sample=1), {"x": torch.full((8, 4), torch.nan)}, NotFinite, 422, "32 of 32 elements"),
        (Push(sample=1, run="other"), None, UnknownRun, 404, "run 'other', this node trains 'run-1'"),
        (Push(sample=-3), None, Dropped, 410, "sample -3 is of a past round"),
        (Unserved(), {}, UnknownRoute, 404, "no route /1/unserved; this axon serves bulk, push, each as /1/ROUTE"),
    ],
)
async def test_refusals_reach_the_caller_as_what_they_were(
    node: Node,
    alice: Dendrite,
    message: Synapse,
    values: dict[str, torch.Tensor] | None,
    kind: type[Refused],
    status: int,
    told: str,
) -> None:
    with pytest.raises(kind) as caught:
        await push(alice, node, message, values)
    assert caught.value.status == status
    assert told in caught.value.message
    assert caught.value.peer == node.axon.endpoint
    assert node.seen == []
    await push(alice, node)  # and the node is none the worse


async def test_wrong_receiver_and_unknown_hotkey(node: Node, alice: Dendrite) -> None:
    with pytest.raises(WrongReceiver, match="look the peer's endpoint up again"):
        await alice.call(node.axon.endpoint, EVE.ss58_address, Push(sample=1), tensors(), reply=Done, deadline=10)
    async with Dendrite(EVE, now_ns=time.time_ns) as eve:
        with pytest.raises(UnknownHotkey, match="no neighbour of this stage; register on subnet 9"):
            await push(eve, node)


async def test_a_clock_that_is_off_is_told_so(node: Node) -> None:
    async with Dendrite(ALICE, now_ns=lambda: time.time_ns() + 60 * 10**9) as ahead:
        with pytest.raises(StaleRequest, match=r"signed -6\d\.\d s ago, allowed -2 to 10 s.*NTP"):
            await push(ahead, node)


async def test_a_recorded_request_is_refused(node: Node) -> None:
    body = b"".join(synapse.encode(Push(sample=1), tensors()))
    recorded = head(body) + body
    reader, writer = await asyncio.open_connection("127.0.0.1", node.axon.port)
    writer.write(recorded)
    await reader.readuntil(b"\r\n\r\n")
    async with raw(node, recorded) as answer:
        assert (answer.status, answer.body["error"]) == (409, "replayed")
    writer.close()
    assert len(node.seen) == 1


@pytest.mark.parametrize(
    ("change", "path", "age_s", "status", "code"),
    [
        ({"Content-Length": None}, "/1/push", 0, 411, "length_required"),
        ({"Content-Length": None, "Transfer-Encoding": "chunked"}, "/1/push", 0, 400, "malformed"),
        ({"Content-Encoding": "gzip"}, "/1/push", 0, 400, "malformed"),
        ({"X-Bittensor-Signature": "0x" + "00" * 64}, "/1/push", 0, 401, "bad_signature"),
        ({"X-Bittensor-Signature": None}, "/1/push", 0, 400, "malformed"),
        ({}, "/1/push", 30, 401, "stale"),
        ({}, "/1/push?x=1", 0, 404, "unknown_route"),
        ({}, "/push", 0, 404, "unknown_route"),
        ({}, "/0/push", 0, 404, "unknown_route"),
        ({}, "/2/push", 0, 404, "other_version"),
        ({}, "/999999999/push", 0, 404, "other_version"),
    ],
)
async def test_bad_headers_are_refused(
    node: Node, change: dict[str, str | None], path: str, age_s: float, status: int, code: str
) -> None:
    async with raw(node, head(b"abc", change=change, path=path, age_s=age_s)) as answer:
        assert (answer.status, answer.body["error"]) == (status, code)
        assert "; " in str(answer.body["message"])
        assert "\n" not in str(answer.body["message"])


async def test_other_methods_are_refused(node: Node) -> None:
    async with raw(node, b"DELETE /push HTTP/1.1\r\nHost: b\r\n\r\n") as answer:
        assert (answer.status, answer.body["error"]) == (400, "malformed")


@pytest.mark.parametrize(
    "request_line", [b"\x00\xff\x00 garbage\r\n\r\n", b"POST /push HTTP/1.1\r\nA: " + b"a" * 20_000]
)
async def test_garbage_and_endless_headers_close_the_connection(
    node: Node, alice: Dendrite, request_line: bytes
) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", node.axon.port)
    writer.write(request_line)
    assert (await reader.read()).startswith(b"HTTP/1.1 400")
    writer.close()
    await push(alice, node)


async def test_an_oversized_body_is_refused_before_it_is_read(node: Node) -> None:
    limit = synapse.max_blob_bytes(SPECS)
    async with raw(node, head(b"", change={"Content-Length": str(1 << 40)})) as answer:
        # Not a byte of the body has been sent yet.
        assert (answer.status, answer.body["error"]) == (413, "too_large")
        assert f"body of {1 << 40} bytes, limit {limit} on this route" in str(answer.body["message"])
        sent = 0
        with contextlib.suppress(ConnectionError):
            while sent < 1 << 28:
                answer.writer.write(bytes(1 << 16))
                await answer.writer.drain()
                sent += 1 << 16
        assert sent < 1 << 25  # what kernels buffer, far from the 256 MiB that were on offer


async def test_a_dendrite_that_sends_too_much_learns_why(node: Node, alice: Dendrite) -> None:
    with pytest.raises(TooLarge, match="limit"):
        await push(alice, node, values={"x": torch.zeros(1 << 18)})


async def test_a_cut_off_body_reaches_no_handler(node: Node, alice: Dendrite) -> None:
    body = b"".join(synapse.encode(Push(sample=1), tensors()))
    _, writer = await asyncio.open_connection("127.0.0.1", node.axon.port)
    writer.write(head(body) + body[:-1])
    writer.close()
    await writer.wait_closed()
    await push(alice, node, Push(sample=2))
    assert [sample for _, sample in node.seen] == [2]


async def test_a_body_that_is_not_the_signed_one_is_refused(node: Node) -> None:
    body = b"".join(synapse.encode(Push(sample=1), tensors()))
    async with raw(node, head(body) + body[:-1] + b"!") as answer:
        assert (answer.status, answer.body["error"]) == (401, "bad_signature")
        assert "not the one that was signed" in str(answer.body["message"])
    assert node.seen == []


@pytest.mark.parametrize("body", [b"", b"garbage", b"\xff" * 100, (10**9).to_bytes(8, "little") + b"{}"])
async def test_signed_garbage_is_refused(node: Node, body: bytes) -> None:
    async with raw(node, head(body) + body) as answer:
        assert (answer.status, answer.body["error"]) == (400, "malformed")


async def test_a_truncated_blob_is_refused(node: Node) -> None:
    body = b"".join(synapse.encode(Push(sample=1), tensors()))[:-4]
    async with raw(node, head(body) + body) as answer:
        assert (answer.status, answer.body["error"]) == (400, "malformed")
        assert f"{len(body)} bytes received, {len(body) + 4} announced" in str(answer.body["message"])


async def test_a_slow_body_is_cut_off() -> None:
    async with running(grace_s=0.1, slots=1) as node, Dendrite(ALICE, now_ns=time.time_ns) as alice:
        async with raw(node, head(b"12345678") + b"1") as answer:
            assert (answer.status, answer.body["error"]) == (408, "too_slow")
            assert "1 of 8 bytes" in str(answer.body["message"])
            assert await answer.reader.read() == b""  # closed
        await push(alice, node)  # its slot is free again


def large_body() -> bytes:
    """4 MiB and a header."""
    return b"".join(synapse.encode(Bulk(), {"x": torch.ones(1024, 2048).bfloat16()}))


async def test_one_changed_byte_in_a_large_body_is_refused(node: Node) -> None:
    body = bytearray(large_body())
    signed = head(bytes(body), path="/1/bulk")
    body[len(body) // 2] ^= 1
    async with raw(node, signed + body) as answer:
        assert (answer.status, answer.body["error"]) == (401, "bad_signature")
        assert "not the one that was signed" in str(answer.body["message"])
    assert node.entered.locked()  # no handler saw it


async def test_a_large_body_cut_off_in_the_middle_frees_its_slot(alice: Dendrite) -> None:
    async with running(slots=1) as node:
        body = large_body()
        _, writer = await asyncio.open_connection("127.0.0.1", node.axon.port)
        writer.write(head(body, path="/1/bulk") + body[: len(body) // 2])
        await writer.drain()
        writer.close()
        async with raw(node, b"GET /health HTTP/1.1\r\n\r\n"):  # accepted after that one
            pass
        await asyncio.wait([*node.axon._talks])
        assert node.entered.locked()
        await push(alice, node)


async def test_a_large_body_that_stalls_is_cut_off() -> None:
    async with running(grace_s=0.1, min_rate=1e9) as node:
        body = large_body()
        async with raw(node, head(body, path="/1/bulk") + body[:1000]) as answer:
            assert (answer.status, answer.body["error"]) == (408, "too_slow")
            assert f"1000 of {len(body)} bytes after 0.1 s" in str(answer.body["message"])


async def test_a_large_body_longer_than_announced_is_no_part_of_it(node: Node) -> None:
    body = large_body()
    reader, writer = await asyncio.open_connection("127.0.0.1", node.axon.port)
    writer.write(head(body, path="/1/bulk") + body + b"more")
    text = (await reader.readuntil(b"\r\n\r\n")).decode()
    await reader.readexactly(int(text.split("Content-Length: ")[1].split("\r\n")[0]))
    writer.write(b"\r\n\r\n")
    assert (await reader.read()).startswith(b"HTTP/1.1 400")  # "more" is no request line
    writer.close()


async def test_a_large_request_refused_at_the_door_says_why(node: Node, alice: Dendrite) -> None:
    x = torch.zeros(1024, 2048).bfloat16()
    for _ in range(3):  # on a new connection each: this one could not be read to its end
        with pytest.raises(WrongReceiver, match="look the peer's endpoint up again"):
            await alice.call(node.axon.endpoint, EVE.ss58_address, Bulk(), {"x": x}, reply=Done, deadline=10)
    await push(alice, node)


async def test_large_messages_share_one_connection_and_small_ones_another(node: Node) -> None:
    async with Dendrite(ALICE, now_ns=time.time_ns, streams=1) as one:
        peers: set[str] = set()
        accept = node.axon._on_request

        async def watch(request: _Request) -> bool:
            peers.add(request.connection.peer)
            return await accept(request)

        node.axon._on_request = watch  # type: ignore[method-assign]
        for number in range(3):
            x = torch.full((1024, 2048), float(number)).bfloat16()
            _, got = await one.call(
                node.axon.endpoint, BOB_KEY, Bulk(), {"x": x}, reply=Done, reply_specs=BIG, deadline=20
            )
            assert torch.equal(got["x"], x + 1)
            await push(one, node, Push(sample=number))
        assert len(peers) == 2


async def test_two_requests_sent_at_once_are_answered_in_order(node: Node) -> None:
    body = [b"".join(synapse.encode(Push(sample=sample), tensors())) for sample in (1, 2)]
    reader, writer = await asyncio.open_connection("127.0.0.1", node.axon.port)
    writer.write(b"".join(head(one) + one for one in body))
    for sample in (1, 2):
        text = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = int(text.split("Content-Length: ")[1].split("\r\n")[0])
        fields, _ = synapse.decode(Done, memoryview(bytearray(await reader.readexactly(length))), SPECS)
        assert fields == Done(sample=sample)
    writer.close()


async def test_a_caller_that_closes_is_closed_on(node: Node) -> None:
    body = b"".join(synapse.encode(Push(sample=1), tensors()))
    reader, writer = await asyncio.open_connection("127.0.0.1", node.axon.port)
    writer.write(head(body, change={"Connection": "close"}) + body)
    assert (await reader.read()).startswith(b"HTTP/1.1 200")  # until the end of the stream
    writer.close()


async def test_a_connection_without_a_request_is_closed() -> None:
    async with running(idle_s=0.05) as node:
        reader, writer = await asyncio.open_connection("127.0.0.1", node.axon.port)
        writer.write(b"POST /push HTTP/1.1\r\n")  # and never more
        assert await reader.read() == b""
        writer.close()


async def test_who_says_nothing_is_a_stranger_for_a_moment_and_who_asked_may_wait(alice: Dendrite) -> None:
    async with running(grace_s=0.1) as node:
        await push(alice, node)
        (neighbour,) = node.axon._talks
        reader, writer = await asyncio.open_connection("127.0.0.1", node.axon.port)
        assert await reader.read() == b""
        writer.close()
        assert not neighbour.done()


async def test_strangers_make_room_for_each_other_and_neighbours_for_nobody(alice: Dendrite) -> None:
    async with running(crowd=Crowd(strangers=2)) as node:
        await push(alice, node)
        ends = [await asyncio.open_connection("127.0.0.1", node.axon.port) for _ in range(5)]
        closed = [asyncio.create_task(reader.read()) for reader, _ in ends]
        await asyncio.wait(closed[:3])
        assert all(isinstance(task.exception(), ConnectionResetError) for task in closed[:3])
        assert not any(task.done() for task in closed[3:])
        await push(alice, node, Push(sample=2))
        assert alice.counters["push"].failed == 0
        assert len(node.axon._talks) == 3
        for _, writer in ends:
            writer.close()
        await asyncio.gather(*closed[3:])


async def test_one_caller_keeps_so_many_connections_and_its_oldest_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subnet.transport.axon.CALLER_CONNECTIONS", 2)
    async with running() as node:
        ends = []
        for sample in range(4):
            body = b"".join(synapse.encode(Push(sample=sample), tensors()))
            reader, writer = await asyncio.open_connection("127.0.0.1", node.axon.port)
            writer.write(head(body) + body)
            answer = (await reader.readuntil(b"\r\n\r\n")).decode()
            await reader.readexactly(int(answer.split("Content-Length: ")[1].split("\r\n")[0]))
            assert answer.split()[1] == "200"
            ends.append((reader, writer))
        for reader, _ in ends[:2]:
            assert await asyncio.wait_for(reader.read(), 10) == b""
        assert len(node.axon._talks) == 2
        assert {len(own) for own in node.axon._by_caller.values()} == {2}
        for _, writer in ends:
            writer.close()
        await asyncio.wait([*node.axon._talks])
        assert not node.axon._by_caller
        assert not node.axon._callers


async def test_who_comes_too_often_is_turned_away_at_once(alice: Dendrite) -> None:
    async with running(crowd=Crowd(burst=3, rate=0.001)) as node:
        await push(alice, node)
        ends = [await asyncio.open_connection("127.0.0.1", node.axon.port) for _ in range(6)]
        reads = await asyncio.gather(
            *(asyncio.wait_for(reader.read(), 10) for reader, _ in ends[3:]), return_exceptions=True
        )
        assert all(isinstance(read, ConnectionResetError) for read in reads)
        await push(alice, node, Push(sample=2))
        for _, writer in ends:
            writer.close()


async def test_a_connection_that_the_axon_closed_is_not_used_again(alice: Dendrite) -> None:
    async with running(idle_s=0.05) as node:
        await push(alice, node)
        await asyncio.wait([*node.axon._talks])
        await push(alice, node, Push(sample=2))
        assert alice.counters["push"].failed == 0


async def test_connections_nobody_uses_are_closed(node: Node) -> None:
    async with Dendrite(ALICE, now_ns=time.time_ns, idle_s=0.05) as alice:
        await push(alice, node)
        await asyncio.wait([*node.axon._talks])
        await push(alice, node, Push(sample=2))


async def test_an_axon_that_stops_abruptly_resets_what_is_in_progress(node: Node, alice: Dendrite) -> None:
    node.gate.clear()
    call = asyncio.create_task(push(alice, node))
    await node.entered.acquire()
    stopping = asyncio.create_task(node.axon.stop(abruptly=True))
    with pytest.raises(Unreachable):
        await call
    assert not stopping.done()  # the handler still has its second
    node.gate.set()
    await stopping


@pytest.mark.parametrize("endpoint", ["https://127.0.0.1:1", "127.0.0.1:1", "http://127.0.0.1", "http://a:1/path"])
async def test_endpoints_that_are_none(alice: Dendrite, endpoint: str) -> None:
    with pytest.raises(ValueError, match="not of the form http://host:port"):
        await alice.call(endpoint, BOB_KEY, Push(sample=1), tensors(), reply=Done, deadline=10)


async def test_a_caller_with_all_slots_taken_is_told_to_back_off(alice: Dendrite) -> None:
    async with running(slots=2) as node:
        node.gate.clear()
        held = [asyncio.create_task(push(alice, node, Push(sample=sample))) for sample in (1, 2)]
        for _ in held:
            await node.entered.acquire()
        with pytest.raises(Busy, match=r"2 requests of .* in progress, limit 2; back off") as busy:
            await push(alice, node, Push(sample=3))
        assert (busy.value.status, busy.value.retry_after) == (429, 0.1)
        async with Dendrite(Keypair.create_from_uri("//Charlie"), now_ns=time.time_ns) as charlie:
            other = asyncio.create_task(push(charlie, node, Push(sample=4)))
            await node.entered.acquire()  # somebody else is served meanwhile
            node.gate.set()
            await asyncio.gather(*held, other)
        await push(alice, node, Push(sample=5))


async def test_full_buffers_refuse_before_buffering(alice: Dendrite) -> None:
    async with running(buffer_bytes=10_000) as node:
        with pytest.raises(Unavailable, match=r"in buffers, limit 10000; back off or try a sibling") as full:
            await alice.call(
                node.axon.endpoint,
                BOB_KEY,
                Bulk(),
                {"x": torch.zeros(1024, 2048).bfloat16()},
                reply=Done,
                deadline=10,
            )
        assert full.value.status == 503


async def test_a_handlers_bug_is_logged_once_and_hurts_nobody(
    node: Node, alice: Dendrite, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        caplog.at_level(logging.ERROR),
        pytest.raises(Broken, match=r"incident \d+-1; its operator's log") as caught,
    ):
        await push(alice, node, Push(sample=13))
    assert caught.value.status == 500
    assert "unlucky" not in caught.value.message
    errors = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert len(errors) == 1
    assert "incident" in errors[0].getMessage()
    assert errors[0].exc_info is not None
    await push(alice, node)


async def test_a_caller_that_is_gone_before_its_reply_costs_one_line(
    node: Node, alice: Dendrite, caplog: pytest.LogCaptureFixture
) -> None:
    node.gate.clear()
    body = b"".join(synapse.encode(Bulk(), {"x": torch.zeros(1024, 2048).bfloat16()}))
    with caplog.at_level(logging.INFO):
        _, writer = await asyncio.open_connection("127.0.0.1", node.axon.port)
        writer.write(head(body, path="/1/bulk") + body)
        await node.entered.acquire()
        writer.transport.abort()
        asked = asyncio.create_task(push(alice, node))
        await node.entered.acquire()  # the loop has seen the end of the other connection by now
        node.gate.set()
        await asked
    assert [record.getMessage() for record in caplog.records if "was gone before its reply" in record.getMessage()]
    assert not [record for record in caplog.records if record.exc_info is not None]


async def test_a_taken_port_says_so(node: Node) -> None:
    door = Admission(BOB_KEY, allow=rule, now_ns=time.time_ns)
    with pytest.raises(PortTaken, match=rf"127.0.0.1 port {node.axon.port} .*--port"):
        await Axon(door, port=node.axon.port).start()


async def test_nobody_there_is_unreachable(alice: Dendrite) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(Unreachable, match=rf"{endpoint} did not answer push .*try a sibling"):
            await alice.call(endpoint, BOB_KEY, Push(sample=1), tensors(), reply=Done, deadline=10)
    assert alice.counters["push"].failed == 1


async def test_a_deadline_ends_the_call_but_not_the_node(node: Node, alice: Dendrite) -> None:
    node.gate.clear()
    with pytest.raises(Unreachable, match=r"no answer to push within 0.1 s; try a sibling or a longer deadline"):
        await alice.call(
            node.axon.endpoint,
            BOB_KEY,
            Push(sample=1),
            tensors(),
            reply=Done,
            reply_specs=SPECS,
            deadline=0.1,
        )
    node.gate.set()
    await push(alice, node)


async def test_stopping_the_axon_ends_open_connections(alice: Dendrite) -> None:
    async with running() as node:
        await push(alice, node)
    with pytest.raises(Unreachable):
        await push(alice, node)


async def test_stopping_the_dendrite_ends_its_calls(node: Node, alice: Dendrite) -> None:
    node.gate.clear()
    calls = [asyncio.create_task(push(alice, node, Push(sample=sample))) for sample in range(6)]
    for _ in range(4):  # two more wait for a stream
        await node.entered.acquire()
    await alice.stop()
    ends = await asyncio.gather(*calls, return_exceptions=True)
    assert all(isinstance(end, Unreachable) for end in ends)
    assert alice.counters["push"].failed == 6


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9999999999\r\n\r\n", "announced a reply of 9999999999 bytes"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", "announced a reply of None bytes"),
        (b"HTTP/1.1 200 OK\r\nOrion-Protocol: 1\r\nContent-Length: 3\r\n\r\nabc", "answered push badly: header of"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc", "answers in protocol None, this node speaks 1"),
        (b"HTTP/1.1 200 OK\r\nOrion-Protocol: 3\r\nContent-Length: 3\r\n\r\nabc", "answers in protocol 3"),
        (b"HTTP/1.1 502 Bad\r\nContent-Length: 4\r\n\r\n<h1>", "answered 502 .*no Orion error"),
        (b"HTTP/1.1 301 Go\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n", "answered 301"),
    ],
)
async def test_answers_that_are_none(alice: Dendrite, answer: bytes, told: str) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await reader.read()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        endpoint = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        with pytest.raises(BadReply, match=told):
            await alice.call(endpoint, BOB_KEY, Push(sample=1), tensors(), reply=Done, deadline=10)
        await alice.stop()


async def test_a_reply_with_other_tensors_is_the_peers_fault(node: Node, alice: Dendrite) -> None:
    with pytest.raises(BadReply, match=r"answered push badly: tensors \['x'\]"):
        await alice.call(node.axon.endpoint, BOB_KEY, Push(sample=1), tensors(), reply=Done, deadline=10)


async def test_concurrent_calls_never_share_a_nonce(node: Node) -> None:
    async with Dendrite(ALICE, now_ns=lambda: frozen) as stopped_clock:
        frozen = time.time_ns()
        for sample in range(3):
            await push(stopped_clock, node, Push(sample=sample))
    assert len(node.seen) == 3


async def test_a_call_that_a_copy_of_it_came_before_is_made_once_more(
    node: Node, alice: Dendrite, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody on the way can be quicker; that costs a try, and two in a row a refusal."""
    accept, nonces = ReplayCache.accept, []

    def beaten(self: ReplayCache, hotkey: str, nonce_ns: int, *, now_ns: int) -> None:
        nonces.append(nonce_ns)
        if len(nonces) in {1, 3, 4}:
            accept(self, hotkey, nonce_ns, now_ns=now_ns)  # the copy's
        accept(self, hotkey, nonce_ns, now_ns=now_ns)

    monkeypatch.setattr(ReplayCache, "accept", beaten)
    await push(alice, node, Push(sample=1))
    assert len(set(nonces)) == len(nonces) == 2
    with pytest.raises(ReplayedRequest):
        await push(alice, node, Push(sample=2))
    assert [sample for _, sample in node.seen] == [1]


def test_routes_are_checked_when_they_are_made() -> None:
    axon = Axon(Admission(BOB_KEY, allow=rule, now_ns=time.time_ns))
    handler: Handler[Push] = Node(axon).push
    axon.serve(Push, handler, specs=SPECS)
    with pytest.raises(ValueError, match="give every served kind a route of its own"):
        axon.serve(Push, handler, specs=SPECS)
    with pytest.raises(ValueError, match="max_bytes is missing for Bulk"):
        axon.serve(Bulk, Node.bulk, specs=lambda _message: BIG)
