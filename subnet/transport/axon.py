"""The server side of a hotkey: an aiohttp server with one POST route per kind of synapse.

A request passes, in order: route, `Admission` (headers only), the body streamed into one preallocated
buffer and hashed as it arrives, the strict decoder, the handler, the reply. Each step refuses with a typed
error that becomes a status code and one line of JSON. Nothing is awaited without a limit: a body, and the
reading of a reply, must keep a minimum rate. A handler's unforeseen exception is logged once with its
traceback, answered as 500 with an id to find it by, and hurts nobody else. aiohttp's low-level server is
used without its application layer, which would cost more than our own work does.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias

import aiohttp
import numpy as np
import torch
from aiohttp import web

from model import hashing
from subnet.transport import sockets, synapse
from subnet.transport.admission import Admission, Ticket
from subnet.transport.errors import (
    BadSignature,
    Broken,
    Busy,
    MalformedRequest,
    Refused,
    TooSlow,
    Unavailable,
    UnknownRoute,
)
from subnet.transport.shaping import TURN, Shaper
from subnet.transport.synapse import S, Specs, Synapse

_log = logging.getLogger("orion.subnet.axon")

Reply: TypeAlias = tuple[Synapse, Mapping[str, torch.Tensor]]
Handler: TypeAlias = Callable[[str, S, dict[str, torch.Tensor]], Awaitable[Reply]]
"""(caller's hotkey, fields, tensors) to the reply. Raise a `Refused` to refuse."""

_DISCARD_BYTES: Final = 256 * 1024
_DISCARD_SECONDS: Final = 1.0


@dataclass(frozen=True, slots=True)
class _Route:
    name: str
    max_bytes: int
    answer: Callable[[str, memoryview], Awaitable[list[memoryview]]]


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
        shaper: Shaper | None = None,
    ) -> None:
        """
        Args:
            admission: the rules at the door; it also names the hotkey that requests must be signed for.
            host: address to listen on.
            port: 0 lets the kernel choose; see `port` once started.
            grace_s: seconds that any body may take, whatever its size.
            min_rate: bytes per second beyond that. Honest senders on slow links cut off with 408? Lower it.
            idle_s: seconds after which a silent connection is closed. Longer than the dendrite's, which
                must be the one to close, or its next call could be lost in between.
            shaper: the emulated link that bodies pass through, for tests; the caller's adds latency and loss.
        """
        self._admission = admission
        self._host = host
        self._wanted_port = port
        self._grace_s = grace_s
        self._min_rate = min_rate
        self._idle_s = idle_s
        self.shaper = shaper
        self._routes: dict[str, _Route] = {}
        self._runner: web.ServerRunner | None = None
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
    ) -> None:
        """Route every synapse of this kind to a handler.

        Args:
            specs: exactly the tensors a request carries, fixed or a function of its fields (may refuse).
            max_bytes: largest body. Follows from fixed specs; must be given where specs depend on the fields.
        """
        if not kind.route or kind.route in self._routes:
            raise ValueError(f"{kind.__name__}.route is {kind.route!r}; give every served kind a route of its own")
        if max_bytes is None:
            if callable(specs):
                raise ValueError(f"max_bytes is missing for {kind.__name__}, whose specs depend on its fields")
            max_bytes = synapse.max_blob_bytes(specs)

        async def answer(caller: str, body: memoryview) -> list[memoryview]:
            fields, tensors = synapse.decode(kind, body, specs)
            return synapse.encode(*await handler(caller, fields, tensors))

        self._routes[kind.route] = _Route(kind.route, max_bytes, answer)

    async def start(self) -> None:
        """Listen.

        Raises:
            PortTaken: the address cannot be bound.
        """
        sock = sockets.listening(self._host, self._wanted_port)
        self._port = sock.getsockname()[1]
        server = web.Server(
            self._on_request,
            access_log=None,
            auto_decompress=False,
            keepalive_timeout=self._idle_s,
            lingering_time=0,  # `_discard` decides how much of a refused body is read
        )
        self._runner = web.ServerRunner(server, shutdown_timeout=1.0)
        await self._runner.setup()
        await web.SockSite(self._runner, sock).start()

    async def stop(self, *, abruptly: bool = False) -> None:
        """Stop listening, give requests in progress a second, close every connection.

        `abruptly` resets the connections first, so that callers see what they see of a process that is killed.
        """
        if self._runner is not None:
            if abruptly and self._runner.server is not None:
                for handler in self._runner.server.connections:
                    if handler.transport is not None:
                        handler.transport.abort()
            await self._runner.cleanup()
            self._runner = None

    async def _on_request(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.method == "GET" and request.raw_path == "/health":
            return web.json_response({"hotkey": self._admission.hotkey, "routes": sorted(self._routes)})
        try:
            route = self._route(request)
            with self._admission.admit(
                request.headers, route=route.name, path=request.raw_path, max_bytes=route.max_bytes
            ) as ticket:
                body = await self._receive(request, ticket)
                parts = await self._answer(route, ticket.caller, body)
                return await self._reply(request, ticket.caller, parts)
        except Refused as refusal:
            return await self._refuse(request, refusal)

    def _route(self, request: web.BaseRequest) -> _Route:
        if request.method != "POST":
            raise MalformedRequest(f"method {request.method[:16]}", "POST a synapse, or GET /health")
        route = self._routes.get(request.raw_path[1:])
        if route is None:
            raise UnknownRoute(
                f"no route {request.raw_path[:64]}",
                f"this axon serves {', '.join(sorted(self._routes)) or 'none'}",
            )
        return route

    async def _receive(self, request: web.BaseRequest, ticket: Ticket) -> memoryview:
        """The body, in one buffer, proven to be the one that was signed."""
        # numpy's, because its large arrays use huge pages and are not zeroed: half the cost of a bytearray.
        body = np.empty(ticket.length, dtype=np.uint8).data
        digest = hashing.hasher()
        filled = 0
        stream = None if self.shaper is None else self.shaper.towards(ticket.caller).down.stream()
        try:
            async with asyncio.timeout(self._patience_s(ticket.length)):
                while filled < ticket.length:
                    chunk = await request.content.readany()
                    if not chunk:
                        break
                    if stream is not None:
                        await stream.carry(len(chunk))
                    body[filled : filled + len(chunk)] = chunk
                    digest.update(chunk)
                    filled += len(chunk)
        except TimeoutError:
            raise TooSlow(
                f"{filled} of {ticket.length} bytes after {self._patience_s(ticket.length):.1f} s, "
                f"minimum rate {self._min_rate:.0f} bytes/s",
                "send over a faster link or fewer streams at a time",
            ) from None
        except (aiohttp.ClientPayloadError, web.RequestPayloadError, ConnectionError):
            pass  # cut off: the count below says so
        if filled < ticket.length:
            raise MalformedRequest(f"{filled} of {ticket.length} bytes received", "send the whole body")
        if digest.digest() != ticket.digest:
            raise BadSignature("the body is not the one that was signed", "send the bytes that Content-Digest is of")
        return body

    async def _answer(self, route: _Route, caller: str, body: memoryview) -> list[memoryview]:
        try:
            return await route.answer(caller, body)
        except Refused:
            raise
        except Exception:  # noqa: BLE001  (the border: whatever a handler does, the node stays up)
            incident = f"{self.port}-{next(self._incidents)}"
            _log.exception("handler of route %s failed for %s (incident %s)", route.name, caller, incident)
            raise Broken(
                f"the handler of {route.name} failed, incident {incident}",
                "its operator's log has the traceback",
            ) from None

    async def _reply(self, request: web.BaseRequest, caller: str, parts: list[memoryview]) -> web.StreamResponse:
        size = synapse.size_of(parts)
        stream = None if self.shaper is None else self.shaper.towards(caller).up.stream()
        if size <= synapse.SLICE and stream is None:
            return web.Response(body=b"".join(parts))
        response = web.StreamResponse()
        response.content_length = size
        try:
            async with asyncio.timeout(self._patience_s(size)):
                await response.prepare(request)
                for piece in synapse.slices(parts, size=synapse.SLICE if stream is None else TURN):
                    if stream is not None:
                        await stream.carry(piece.nbytes)
                    await response.write(piece)
                await response.write_eof()
        except TimeoutError:
            _log.warning("%s took too long to read a reply of %d bytes; cut off", request.remote, size)
            if request.transport is not None:
                request.transport.abort()
        except ConnectionError:  # also a caller that gave up while this process was stopped
            _log.info("%s was gone before its reply of %d bytes", request.remote, size)
        return response

    async def _refuse(self, request: web.BaseRequest, refusal: Refused) -> web.StreamResponse:
        """Answer with the error. The connection survives if the body was read, or is worth reading."""
        _log.debug("refused %s %s: %s", request.remote, refusal.code, refusal.message)
        if isinstance(refusal, Busy | Unavailable):
            # A known caller, soon to be back: a new connection would cost it more than this body does.
            await self._discard(request, limit=None, seconds=self._patience_s(request.content_length or 0))
        response = web.Response(status=refusal.status, body=refusal.to_wire(), content_type="application/json")
        if not request.content.is_eof():
            response.force_close()
            try:
                await response.prepare(request)
                await response.write_eof()
            except ConnectionError:
                _log.info("%s was gone before it could be refused (%s)", request.remote, refusal.code)
                return response
            # Closing on unread bytes resets the connection, which can overtake the answer: leave it a moment.
            await self._discard(request, limit=_DISCARD_BYTES, seconds=_DISCARD_SECONDS)
        return response

    @staticmethod
    async def _discard(request: web.BaseRequest, *, limit: int | None, seconds: float) -> None:
        left = limit
        try:
            async with asyncio.timeout(seconds):
                while left is None or left > 0:
                    chunk = await request.content.readany()
                    if not chunk:
                        return
                    left = None if left is None else left - len(chunk)
        except (TimeoutError, aiohttp.ClientPayloadError, web.RequestPayloadError, ConnectionError):
            return

    def _patience_s(self, size: int) -> float:
        return self._grace_s + size / self._min_rate
