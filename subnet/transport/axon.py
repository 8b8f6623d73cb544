"""The server side of a hotkey: HTTP/1.1 with one POST route per kind of synapse.

A request passes, in order: its head, the route, `Admission` (headers only), the body received into one
preallocated buffer and hashed as it arrives, the strict decoder, the handler, the reply. Each step refuses
with a typed error that becomes a status code and one line of JSON. Nothing is awaited without a limit: a
head, a body, and the reading of a reply, of which the last two must keep a minimum rate. A handler's
unforeseen exception is logged once with its traceback, answered as 500 with an id to find it by, and hurts
nobody else.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import math
import socket
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias

import torch

from subnet.transport import http1, protocol, synapse
from subnet.transport.admission import Admission, Ticket
from subnet.transport.connection import Connection, close_abruptly
from subnet.transport.crowd import Crowd, source_of
from subnet.transport.digests import Running
from subnet.transport.errors import (
    BadSignature,
    Broken,
    Busy,
    MalformedRequest,
    OtherVersion,
    Refused,
    TooSlow,
    Unavailable,
    UnknownRoute,
)
from subnet.transport.http1 import BadHead, RequestHead
from subnet.transport.memory import Memory
from subnet.transport.protocol import PROTOCOL
from subnet.transport.shaping import TURN, Pipe, Shaper
from subnet.transport.sockets import THIS_MACHINE, Sockets
from subnet.transport.synapse import Received, S, Specs, Synapse

_log = logging.getLogger("orion.subnet.axon")

Reply: TypeAlias = tuple[Synapse, Mapping[str, torch.Tensor]]
Handler: TypeAlias = Callable[[str, S, Received], Awaitable[Reply]]
"""(caller's hotkey, fields, tensors) to the reply. Raise a `Refused` to refuse."""

_BINARY: Final = "application/octet-stream"
_JSON: Final = "application/json"
_DISCARD_BYTES: Final = 256 * 1024
_DISCARD_SECONDS: Final = 1.0
_STOP_SECONDS: Final = 1.0
_ACCEPT_PAUSE: Final = 1.0
"""Seconds without new connections after the system had no room for one."""
CALLER_CONNECTIONS: Final = 64
"""Of one hotkey; a dendrite has nine to a neighbour."""
_TURNED_AWAY: Final = 32
"""Connections that are turned away in a row, and the seconds until the next: a seventh of a core at most. Whoever is
welcome waits less than a second behind a full queue of them."""
_TURNED_AWAY_PAUSE: Final = 0.005


@dataclass(frozen=True, slots=True)
class _Route:
    name: str
    max_bytes: int
    gate: Callable[[str], None]
    """Asked with the caller's hotkey, which is proven, before the body is read; may refuse."""
    answer: Callable[[Ticket, memoryview, str], Awaitable[list[memoryview]]]
    """Admitted request, its body and the IP address it came from to the reply."""


@dataclass(slots=True)
class _Request:
    """One request on a connection, and how much of its body has been taken from it."""

    connection: Connection
    head: RequestHead
    received: int = 0
    caller: str = ""
    """Who sent it, once that is proven and admitted."""

    @property
    def left(self) -> int | None:
        """Bytes of the body still to come; None if nobody can tell."""
        if "transfer-encoding" not in self.head.fields and "content-length" not in self.head.fields:
            return 0
        length = self.head.length
        return None if length is None else length - self.received


class Axon:
    """Serves synapses for one hotkey until stopped."""

    def __init__(
        self,
        admission: Admission,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        grace_s: float = 5.0,
        min_rate: float = 125_000.0,
        idle_s: float = 120.0,
        crowd: Crowd[asyncio.Task[None]] | None = None,
        shaper: Shaper | None = None,
        version: int = PROTOCOL,
        sockets: Sockets = THIS_MACHINE,
    ) -> None:
        """
        Args:
            admission: the rules at the door; it also names the hotkey that requests must be signed for.
            host: address to listen on.
            port: 0 lets the kernel choose; see `port` once started.
            grace_s: seconds that any body may take, whatever its size.
            min_rate: bytes per second beyond that. Honest senders on slow links cut off with 408? Lower it.
            idle_s: seconds after which a connection without a request is closed. Longer than the dendrite's, which
                must be the one to close, or its next call could be lost in between.
            crowd: how many strangers may be connected, and how fast they may come (default: `Crowd`'s own).
            shaper: the emulated link that bodies pass through, for tests; the caller's adds latency and loss.
            version: of the protocol; requests in the one before are served too.
        """
        self._admission = admission
        self._host = host
        self._wanted_port = port
        self._grace_s = grace_s
        self._min_rate = min_rate
        self._idle_s = idle_s
        self._crowd: Crowd[asyncio.Task[None]] = Crowd() if crowd is None else crowd
        self.shaper = shaper
        self._version = version
        self._sockets = sockets
        self._stated = (f"{protocol.FIELD}: {version}",)
        self._routes: dict[str, _Route] = {}
        self._memory = Memory()
        self._listening: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._talks: dict[asyncio.Task[None], Connection] = {}
        self._callers: dict[asyncio.Task[None], str] = {}
        self._by_caller: dict[str, dict[asyncio.Task[None], None]] = {}
        """Connections by the hotkey that was first admitted on them, oldest first."""
        self._busy: set[asyncio.Task[None]] = set()
        self._port: int | None = None
        self._incidents = itertools.count(1)

    @property
    def port(self) -> int:
        """The port listened on. Raises RuntimeError before `start`."""
        if self._port is None:
            raise RuntimeError("the axon has no port before start()")
        return self._port

    @property
    def endpoint(self) -> str:
        """Where a dendrite on this host reaches it, as ``http://host:port``."""
        return f"http://[{self._host}]:{self.port}" if ":" in self._host else f"http://{self._host}:{self.port}"

    def serve(
        self,
        kind: type[S],
        handler: Handler[S],
        *,
        specs: Specs | Callable[[S], Specs],
        max_bytes: int | None = None,
        gate: Callable[[str], None] = lambda _caller: None,
    ) -> None:
        """Route every synapse of this kind to a handler.

        Args:
            specs: exactly the tensors a request carries, fixed or a function of its fields (may refuse).
            max_bytes: largest body. Follows from fixed specs; must be given where specs depend on the fields.
            gate: asked with the caller's hotkey once that is proven and before the body is read; may refuse.
        """
        if not kind.route or kind.route in self._routes:
            raise ValueError(f"{kind.__name__}.route is {kind.route!r}; give every served kind a route of its own")
        if max_bytes is None:
            if callable(specs):
                raise ValueError(f"max_bytes is missing for {kind.__name__}, whose specs depend on its fields")
            max_bytes = synapse.max_blob_bytes(specs)

        async def answer(ticket: Ticket, body: memoryview, source: str) -> list[memoryview]:
            fields, tensors = synapse.decode(kind, body, specs)
            received = Received(tensors, payload=ticket.digests.payload, source=source)
            return synapse.encode(*await handler(ticket.caller, fields, received))

        self._routes[kind.route] = _Route(kind.route, max_bytes, gate, answer)

    async def start(self) -> None:
        """Listen.

        Raises:
            PortTaken: the address cannot be bound.
        """
        self._listening = self._sockets.listening(self._host, self._wanted_port)
        self._port = self._listening.getsockname()[1]
        self._accepting = asyncio.create_task(self._accept(self._listening))

    async def stop(self, *, abruptly: bool = False) -> None:
        """Stop listening, give requests in progress a second, close every connection.

        `abruptly` resets the connections first, so that callers see what they see of a process that is killed.
        """
        if self._listening is None or self._accepting is None:
            return
        self._accepting.cancel()
        await asyncio.wait([self._accepting])
        self._listening.close()
        self._listening = None
        if abruptly:
            for connection in self._talks.values():
                connection.close(abruptly=True)
        for idle in self._talks.keys() - self._busy:
            idle.cancel()
        if self._busy:
            await asyncio.wait(self._busy, timeout=_STOP_SECONDS)
        for late in self._talks:
            late.cancel()
        await asyncio.gather(*self._talks, return_exceptions=True)

    async def _accept(self, listening: socket.socket) -> None:
        loop, turned_away = asyncio.get_running_loop(), 0
        while True:
            try:
                sock, address = await loop.sock_accept(listening)
            except OSError as error:
                _log.error("cannot accept a connection (%s); raise the limit of open files (ulimit -n)", error)
                await asyncio.sleep(_ACCEPT_PAUSE)
                continue
            source = source_of(address[0])
            if self._crowd.may_enter(source, loop.time()):
                self._welcome(Connection(sock, f"{address[0]}:{address[1]}"), source)
                await asyncio.sleep(0)  # else all that wait at the door would come before anybody inside
                continue
            close_abruptly(sock)
            turned_away += 1
            if turned_away % _TURNED_AWAY == 0:
                await asyncio.sleep(_TURNED_AWAY_PAUSE)

    def _welcome(self, connection: Connection, source: str) -> None:
        talk = asyncio.create_task(self._converse(connection))
        self._talks[talk] = connection
        talk.add_done_callback(self._part)
        gone = self._crowd.enter(talk, source)
        if gone is not None:
            _log.debug("%s makes room for another stranger", self._talks[gone].peer)
            self._talks[gone].close(abruptly=True)

    def _know(self, talk: asyncio.Task[None], caller: str) -> None:
        """It is no stranger's any more. Of one caller's too many the oldest goes that carries no request."""
        self._crowd.leave(talk)
        self._callers[talk] = caller
        own = self._by_caller.setdefault(caller, {})
        own[talk] = None
        if len(own) > CALLER_CONNECTIONS:
            oldest = next(other for other in own if other is talk or other not in self._busy)
            self._forget(oldest)
            self._talks[oldest].close()

    def _forget(self, talk: asyncio.Task[None]) -> None:
        caller = self._callers.pop(talk, "")
        own = self._by_caller.get(caller, {})
        own.pop(talk, None)
        if not own:
            self._by_caller.pop(caller, None)

    def _part(self, talk: asyncio.Task[None]) -> None:
        self._talks.pop(talk)
        self._crowd.leave(talk)
        self._forget(talk)

    async def _converse(self, connection: Connection) -> None:
        """Serve one connection until either side has enough."""
        talk = asyncio.current_task()
        if talk is None:
            raise RuntimeError("a conversation is a task")
        try:
            while self._listening is not None:
                async with asyncio.timeout(self._idle_s if talk in self._callers else min(self._idle_s, self._grace_s)):
                    raw = await connection.head()
                if raw is None:
                    return
                self._busy.add(talk)
                request = _Request(connection, http1.parse_request(raw))
                if not await self._on_request(request):
                    return
                if request.caller and talk not in self._callers:
                    self._know(talk, request.caller)
                self._busy.discard(talk)
                await asyncio.sleep(0)  # a caller that never pauses holds up nobody else
        except BadHead as error:
            refusal = MalformedRequest(str(error), "POST a synapse over HTTP/1.1")
            parts = [memoryview(refusal.to_wire())]
            await self._respond(connection, refusal.status, parts, kind=_JSON, keep=False)
            await self._discard(connection, _DISCARD_BYTES, seconds=_DISCARD_SECONDS)
        except TimeoutError:
            _log.debug("%s sent no request in time", connection.peer)
        except OSError as error:
            _log.debug("%s is gone: %s", connection.peer, error)
        finally:
            self._busy.discard(talk)
            connection.close()

    async def _on_request(self, request: _Request) -> bool:
        """Answer one request; whether its connection can carry another."""
        head, connection = request.head, request.connection
        if head.method == "GET" and head.target == "/health":
            keep = head.keeps and request.left == 0
            return await self._respond(connection, 200, [memoryview(self._health())], kind=_JSON, keep=keep) and keep
        try:
            route = self._route(head)
            with self._admission.admit(
                head.fields, route=route.name, path=head.target, max_bytes=route.max_bytes
            ) as ticket:
                request.caller = ticket.caller
                route.gate(ticket.caller)
                body = await self._receive(request, ticket)
                parts = await self._answer(route, ticket, body, connection.source)
                up = None if self.shaper is None else self.shaper.towards(ticket.caller).up
                return await self._respond(connection, 200, parts, kind=_BINARY, keep=head.keeps, up=up) and head.keeps
        except Refused as refusal:
            return await self._refuse(request, refusal)

    def _route(self, head: RequestHead) -> _Route:
        if head.method != "POST":
            raise MalformedRequest(f"method {head.method}", "POST a synapse, or GET /health")
        version, name = protocol.read_target(head.target) or (self._version, "")
        if version not in protocol.spoken(mine=self._version):
            raise OtherVersion(*protocol.mismatch(version, mine=self._version))
        route = self._routes.get(name)
        if route is None:
            raise UnknownRoute(
                f"no route {head.target[:64]}",
                f"this axon serves {', '.join(sorted(self._routes)) or 'none'}, each as /{self._version}/ROUTE",
            )
        return route

    def _health(self) -> bytes:
        """What anybody may know, JSON."""
        said = {"hotkey": self._admission.hotkey, "routes": sorted(self._routes), "protocol": self._version}
        return json.dumps(said | {"orion": protocol.package_version()}).encode()

    async def _receive(self, request: _Request, ticket: Ticket) -> memoryview:
        """The body, in one buffer, proven to be the one that was signed."""
        body = self._memory.take(ticket.length)
        running = Running()

        def seen(piece: memoryview) -> None:
            running.update(piece)
            request.received += piece.nbytes

        try:
            async with asyncio.timeout(self._patience_s(ticket.length)):
                down = None if self.shaper is None else self.shaper.towards(ticket.caller).down
                if down is None or math.isinf(down.bandwidth_bps):
                    await request.connection.fill(body, seen)
                else:
                    await self._receive_shaped(request.connection, body, seen, down)
        except TimeoutError:
            raise TooSlow(
                f"{request.received} of {ticket.length} bytes after {self._patience_s(ticket.length):.1f} s, "
                f"minimum rate {self._min_rate:.0f} bytes/s",
                "send over a faster link or fewer streams at a time",
            ) from None
        except OSError:
            pass  # cut off: the count below says so
        if request.received < ticket.length:
            raise MalformedRequest(f"{request.received} of {ticket.length} bytes received", "send the whole body")
        if running.digests() != ticket.digests:
            raise BadSignature("the body is not the one that was signed", "send the bytes that Content-Digest is of")
        return body

    @staticmethod
    async def _receive_shaped(
        connection: Connection, body: memoryview, seen: Callable[[memoryview], None], down: Pipe
    ) -> None:
        filled, stream = 0, down.stream()
        while filled < body.nbytes:
            got = await connection.some(body[filled : filled + down.turn])
            if not got:
                return
            await stream.carry(got)
            seen(body[filled : filled + got])
            filled += got

    async def _answer(self, route: _Route, ticket: Ticket, body: memoryview, source: str) -> list[memoryview]:
        try:
            return await route.answer(ticket, body, source)
        except Refused:
            raise
        except Exception:  # noqa: BLE001  (the border: whatever a handler does, the node stays up)
            incident = f"{self.port}-{next(self._incidents)}"
            _log.exception("handler of route %s failed for %s (incident %s)", route.name, ticket.caller, incident)
            raise Broken(
                f"the handler of {route.name} failed, incident {incident}",
                "its operator's log has the traceback",
            ) from None

    async def _refuse(self, request: _Request, refusal: Refused) -> bool:
        """Answer with the error. The connection survives if the body was read, or is worth reading."""
        connection = request.connection
        _log.debug("refused %s %s: %s", connection.peer, refusal.code, refusal.message)
        if isinstance(refusal, Busy | Unavailable):
            # A known caller, soon to be back: a new connection would cost it more than this body does.
            size = request.left or 0
            request.received += await self._discard(connection, size, seconds=self._patience_s(size))
        keep = request.head.keeps and request.left == 0
        parts = [memoryview(refusal.to_wire())]
        sent = await self._respond(connection, refusal.status, parts, kind=_JSON, keep=keep)
        if sent and not keep:
            # Closing on unread bytes resets the connection, which can overtake the answer: leave it a moment.
            await self._discard(connection, _DISCARD_BYTES, seconds=_DISCARD_SECONDS)
        return sent and keep

    async def _respond(
        self,
        connection: Connection,
        status: int,
        parts: list[memoryview],
        *,
        kind: str,
        keep: bool,
        up: Pipe | None = None,
    ) -> bool:
        """Send an answer of this media type; whether it left in time."""
        size = synapse.size_of(parts)
        head = http1.response(status, size, kind=kind, keep=keep, more=self._stated)
        try:
            async with asyncio.timeout(self._patience_s(size)):
                if up is None:
                    await connection.write([head, *parts])
                else:
                    stream = up.stream()
                    await connection.write([head])
                    for piece in synapse.slices(parts, size=up.turn):
                        await stream.carry(piece.nbytes)
                        await connection.write([piece])
        except TimeoutError:
            _log.warning("%s took too long to read a reply of %d bytes; cut off", connection.peer, size)
            return False
        except OSError:  # also a caller that gave up while this process was stopped
            _log.info("%s was gone before its reply of %d bytes", connection.peer, size)
            return False
        return True

    @staticmethod
    async def _discard(connection: Connection, size: int, *, seconds: float) -> int:
        """Read up to `size` bytes that nobody wants; how many came in time."""
        scratch, count = memoryview(bytearray(TURN)), 0
        try:
            async with asyncio.timeout(seconds):
                while count < size and (got := await connection.some(scratch[: size - count])):
                    count += got
        except (TimeoutError, OSError):
            pass  # the count says so
        return count

    def _patience_s(self, size: int) -> float:
        return self._grace_s + size / self._min_rate
