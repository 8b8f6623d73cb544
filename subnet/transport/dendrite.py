"""The client side of a hotkey: signed calls over warm connections.

Up to eight keep-alive connections per neighbour. A call takes one of them; sends the tensors straight from their
memory, when those before it have left for the same neighbour, and signs first, so that waiting never ages a
signature; receives the reply into one buffer whose size was bounded beforehand. Every call has a deadline and is
tried once: whether to try again, and where, is the caller's knowledge. It ends in the reply, or in `Refused` (the
peer said no), `Unreachable` (nobody knows) or `BadReply` (the peer is broken).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType, TracebackType
from typing import Final, Self

import torch

from subnet.transport import auth, http1, protocol, synapse
from subnet.transport.auth import Signer
from subnet.transport.connection import Connection
from subnet.transport.digests import Digests
from subnet.transport.errors import (
    BadReply,
    OtherVersion,
    Refused,
    ReplayedRequest,
    Silent,
    Unreachable,
    Unserved,
    from_wire,
)
from subnet.transport.http1 import BadHead, ResponseHead
from subnet.transport.memory import Memory
from subnet.transport.pool import Neighbour
from subnet.transport.protocol import PROTOCOL
from subnet.transport.shaping import TURN, Pipe, Shaper
from subnet.transport.sockets import THIS_MACHINE, Sockets
from subnet.transport.synapse import S, Specs, Synapse

NO_TENSORS: Final[Mapping[str, torch.Tensor]] = MappingProxyType({})
NO_SPECS: Final[Specs] = MappingProxyType({})

STREAMS: Final = 8
"""Connections per neighbour, and calls in flight to it, unless told otherwise."""
_ERROR_LIMIT: Final = 8 * 1024


@dataclass(slots=True)
class Traffic:
    """What one route has cost so far; bytes are bodies, without HTTP headers."""

    calls: int = 0
    sent: int = 0
    received: int = 0
    refused: int = 0
    failed: int = 0


@dataclass(frozen=True, slots=True)
class _Call:
    """What stays the same however a call is made."""

    neighbour: Neighbour
    receiver: str
    route: str
    max_reply_bytes: int
    traffic: Traffic
    deadline: float


class Dendrite:
    """Calls axons in the name of one hotkey. Use one per hotkey: it keeps that hotkey's nonces unique."""

    def __init__(
        self,
        signer: Signer,
        *,
        now_ns: Callable[[], int],
        streams: int = STREAMS,
        idle_s: float = 90.0,
        shaper: Shaper | None = None,
        version: int = PROTOCOL,
        sockets: Sockets = THIS_MACHINE,
    ) -> None:
        """
        Args:
            signer: the hotkey.
            now_ns: Unix time in nanoseconds; nonces are made from it.
            streams: connections per neighbour, and calls in flight to it.
            idle_s: seconds a connection is kept warm without traffic.
            shaper: the emulated link that calls pass through, for tests.
            version: of the protocol; who speaks the one before is called in that.
        """
        self._signer = signer
        self._now_ns = now_ns
        self.streams = streams
        """Calls in flight to one neighbour."""
        self._idle_s = idle_s
        self.shaper = shaper
        self._version = version
        self._sockets = sockets
        self._memory = Memory()
        self._running = False
        self._neighbours: dict[str, Neighbour] = {}
        self._cooling: asyncio.TimerHandle | None = None
        self._last_nonce = 0
        self.counters: dict[str, Traffic] = {}
        """Traffic per route."""

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def start(self) -> None:
        """Begin; connections are made when first needed."""
        self._running = True
        self._cool()

    async def stop(self) -> None:
        """Close every connection; calls in flight end as `Unreachable`."""
        self._running = False
        if self._cooling is not None:
            self._cooling.cancel()
            self._cooling = None
        for neighbour in self._neighbours.values():
            neighbour.close()
        self._neighbours.clear()

    def _cool(self) -> None:
        """Close connections that nobody has used for a while."""
        loop = asyncio.get_running_loop()
        for neighbour in self._neighbours.values():
            neighbour.cool(loop.time() - self._idle_s)
        self._cooling = loop.call_later(self._idle_s / 4, self._cool)

    async def call(
        self,
        endpoint: str,
        receiver: str,
        message: Synapse,
        tensors: Mapping[str, torch.Tensor] = NO_TENSORS,
        *,
        reply: type[S],
        reply_specs: Specs | Callable[[S], Specs] = NO_SPECS,
        max_reply_bytes: int | None = None,
        deadline: float,
        payload: bytes | None = None,
    ) -> tuple[S, dict[str, torch.Tensor]]:
        """Send one message and wait for its reply.

        Args:
            endpoint: ``http://host:port`` of the axon.
            receiver: its hotkey; nobody else can use the request.
            tensors: in host memory; not to be written to until the call ends.
            reply: model of the reply's fields.
            reply_specs: exactly the tensors of the reply, fixed or as a function of its fields.
            max_reply_bytes: bound for the reply, needed where its specs depend on its fields.
            deadline: seconds that everything may take, waiting for a stream included. For a large body, which goes
                behind others (`line`), they begin when it is its turn to leave: those before it have their own.
            payload: BLAKE3 of the tensors' bytes, end to end in the order of `synapse.encode`, where it is known.

        Raises:
            Refused: the subclass that the axon raised.
            Unreachable: no complete answer in time.
            BadReply: the answer is not what was asked for.
            ValueError: the message cannot be sent at all, see `synapse.encode`; or `endpoint` is none.
        """
        if not self._running or not message.route:
            raise ValueError("call start() first" if message.route else f"{type(message).__name__} has no route")
        if max_reply_bytes is None:
            if callable(reply_specs):
                raise ValueError(f"max_reply_bytes is missing for {reply.__name__}, whose specs depend on its fields")
            max_reply_bytes = synapse.max_blob_bytes(reply_specs)
        traffic = self.counters.setdefault(message.route, Traffic())
        traffic.calls += 1
        parts = synapse.encode(message, tensors)
        neighbour = self._neighbours.get(endpoint)
        if neighbour is None:
            neighbour = self._neighbours[endpoint] = Neighbour(
                endpoint, self.streams, version=self._version, sockets=self._sockets
            )
        call = _Call(neighbour, receiver, message.route, max_reply_bytes, traffic, deadline)
        queues = synapse.size_of(parts) > TURN
        try:
            async with asyncio.timeout(None if queues else deadline):
                blob = await self._deliver(call, parts, payload=payload)
            fields, received = synapse.decode(reply, blob, reply_specs)
        except TimeoutError:
            traffic.failed += 1
            raise Silent(
                f"{endpoint} gave no answer to {message.route} within {deadline:g} s; "
                "try a sibling or a longer deadline"
            ) from None
        except OSError as error:
            traffic.failed += 1
            raise Unreachable(
                f"{endpoint} did not answer {message.route} ({type(error).__name__}: {error}); try a sibling"
            ) from error
        except Refused as refusal:
            if refusal.peer is None:  # ours: what came back does not decode
                traffic.failed += 1
                raise BadReply(f"{endpoint} answered {message.route} badly: {refusal.message}") from None
            traffic.refused += 1
            raise
        except (BadReply, Unreachable):
            traffic.failed += 1
            raise
        return fields, received

    async def _deliver(self, call: _Call, parts: Sequence[memoryview], *, payload: bytes | None) -> memoryview:
        neighbour, size = call.neighbour, synapse.size_of(parts)
        large = size >= synapse.OFF_LOOP
        hashed = partial(Digests.of, parts, payload=payload)
        digests = await asyncio.to_thread(hashed) if large and payload is None else hashed()
        async with neighbour.gate:
            try:
                return await self._exchange(call, parts, digests)
            except (Unserved, ReplayedRequest):  # nobody else signs in this name: a copy of the request came first
                return await self._exchange(call, parts, digests)

    async def _exchange(self, call: _Call, parts: Sequence[memoryview], digests: Digests) -> memoryview:
        """One request and its answer."""
        neighbour, traffic, size = call.neighbour, call.traffic, synapse.size_of(parts)
        version = neighbour.version
        shaper = None if self.shaper is None else self.shaper.towards(call.receiver)
        up = down = None
        if shaper is not None:
            await shaper.depart(size)
            up, down = shaper.up, shaper.down
        if not self._running:
            raise Unreachable("this dendrite was stopped before the call was sent")

        def request() -> bytes:
            self._last_nonce = max(self._now_ns(), self._last_nonce + 1)
            path, nonce = protocol.target(call.route, version), self._last_nonce
            signed = auth.sign(self._signer, path=path, digests=digests, receiver=call.receiver, nonce_ns=nonce)
            fields = {"Host": neighbour.authority, "Content-Length": str(size), **signed}
            return http1.request("POST", path, fields)

        async def answer(connection: Connection) -> tuple[ResponseHead, memoryview]:
            traffic.sent += size
            head = await _head(connection)
            limit = call.max_reply_bytes if head.status == 200 else _ERROR_LIMIT
            blob = await _read(connection, head, limit, self._memory, down)
            traffic.received += blob.nbytes
            return head, blob

        if size > TURN:
            head, blob = await _in_line(call, request, parts, answer, up)
        else:
            head, blob = await _alone(neighbour, request, parts, answer, up)
        if shaper is not None:
            await shaper.arrive(blob.nbytes)
        return self._judged(neighbour, version, head, blob)

    def _judged(self, neighbour: Neighbour, version: int, head: ResponseHead, blob: memoryview) -> memoryview:
        """The answer to a request in this version of the protocol, if it is a reply; else raises what it says."""
        theirs = protocol.read_field(head.fields)
        common = None if theirs is None else protocol.common(theirs, mine=self._version)
        neighbour.version = common or version
        if head.status == 200 and common is not None:
            return blob
        if head.status == 200:
            raise BadReply(f"{neighbour.endpoint} answers in protocol {theirs}, this node speaks {self._version}")
        error = from_wire(head.status, bytes(blob))
        if isinstance(error, BadReply):
            raise BadReply(f"{neighbour.endpoint} {error}")
        error.peer = neighbour.endpoint
        if isinstance(error, OtherVersion) and common not in {None, version}:
            raise Unserved(f"{neighbour.endpoint} speaks protocol {common}; send it again in that") from error
        raise error


async def _alone(
    neighbour: Neighbour,
    request: Callable[[], bytes],
    parts: Sequence[memoryview],
    answer: Callable[[Connection], Awaitable[tuple[ResponseHead, memoryview]]],
    up: Pipe | None,
) -> tuple[ResponseHead, memoryview]:
    """Send a request over a connection of its own and read the answer."""
    connection = await neighbour.take()
    reusable = False
    try:
        sent = await _send(connection, request(), parts, up)
        head, blob = await answer(connection)
        reusable = sent and head.keeps
    finally:
        if reusable:
            neighbour.put(connection)
        else:
            neighbour.drop(connection)
    return head, blob


async def _in_line(
    call: _Call,
    request: Callable[[], bytes],
    parts: Sequence[memoryview],
    answer: Callable[[Connection], Awaitable[tuple[ResponseHead, memoryview]]],
    up: Pipe | None,
) -> tuple[ResponseHead, memoryview]:
    """Send a request behind others, and read its answer behind theirs."""
    async with call.neighbour.turn:
        until = asyncio.get_running_loop().time() + call.deadline
        async with asyncio.timeout_at(until):
            line = await call.neighbour.line()
            member = line.enter()
            try:
                sent = await _send(line.connection, request(), parts, up, heed=member.first)
            except BaseException as error:
                served = member.first
                line.end()
                if isinstance(error, OSError) and not served:
                    raise Unserved(f"{line.connection.peer} closed before its answer; send it again") from error
                raise
    keeps = False
    try:
        async with asyncio.timeout_at(until):
            await member.turn
            head, blob = await answer(line.connection)
        keeps = sent and head.keeps
    finally:
        line.leave(member, keeps=keeps)
    return head, blob


async def _send(
    connection: Connection, head: bytes, parts: Sequence[memoryview], up: Pipe | None, *, heed: bool = True
) -> bool:
    """Send a request; whether all of it left. What is answered before that (`heed`) was refused, and need not leave."""
    try:
        if up is None:
            return await connection.write([head, *parts], heed=heed)
        stream = up.stream()
        whole = await connection.write([head], heed=heed)
        for piece in synapse.slices(parts, size=up.turn):
            await stream.carry(piece.nbytes)
            whole = whole and await connection.write([piece], heed=heed)
            if not whole:
                break
    except (BrokenPipeError, ConnectionResetError):
        return False  # it may have said why before it closed: `_head` finds out
    return whole


async def _head(connection: Connection) -> ResponseHead:
    try:
        raw = await connection.head()
        if raw is not None:
            return http1.parse_response(raw)
    except BadHead as error:
        raise BadReply(f"{connection.peer} does not answer in HTTP/1.1: {error}") from None
    raise Unreachable(f"{connection.peer} closed without an answer; try a sibling")


async def _read(
    connection: Connection, head: ResponseHead, limit: int, memory: Memory, down: Pipe | None
) -> memoryview:
    size = head.length
    if size is None or size > limit:
        raise BadReply(f"{connection.peer} announced a reply of {size} bytes, limit {limit}")
    blob = memory.take(size)
    if down is None:
        filled = await connection.fill(blob)
    else:
        filled, stream = 0, down.stream()
        while filled < size and (got := await connection.some(blob[filled : filled + down.turn])):
            await stream.carry(got)
            filled += got
    if filled < size:
        raise Unreachable(f"{connection.peer} closed after {filled} of {size} bytes; try a sibling")
    return blob
