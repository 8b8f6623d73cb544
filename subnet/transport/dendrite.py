"""The client side of a hotkey: signed calls over warm connections.

One aiohttp session with up to four keep-alive connections per neighbour (a cold one costs 300 to 400 ms for
the first boundary tensor at 50 ms round trip). A call takes a stream of that neighbour, then signs, so that
waiting never ages a signature; sends the tensors straight from their memory; receives the reply into one
buffer whose size was bounded beforehand. Every call has a deadline and is tried once: whether to try again,
and where, is the caller's knowledge. It ends in the reply, or in `Refused` (the peer said no),
`Unreachable` (nobody knows) or `BadReply` (the peer is broken).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType, TracebackType
from typing import Final, Self

import aiohttp
import numpy as np
import torch
from aiohttp.abc import AbstractStreamWriter
from aiohttp.payload import Payload
from yarl import URL

from model import hashing
from subnet.transport import auth, sockets, synapse
from subnet.transport.auth import Signer
from subnet.transport.errors import BadReply, Refused, Silent, Unreachable, from_wire
from subnet.transport.shaping import TURN, Pipe, Shaper
from subnet.transport.synapse import S, Specs, Synapse

NO_TENSORS: Final[Mapping[str, torch.Tensor]] = MappingProxyType({})
NO_SPECS: Final[Specs] = MappingProxyType({})

_ERROR_LIMIT: Final = 8 * 1024
_HASH_OFF_LOOP: Final = 4 * 1024 * 1024
"""Bodies of this many bytes are hashed in a thread: what would stall the loop for a millisecond."""


@dataclass(slots=True)
class Traffic:
    """What one route has cost so far; bytes are bodies, without HTTP headers."""

    calls: int = 0
    sent: int = 0
    received: int = 0
    refused: int = 0
    failed: int = 0


class Dendrite:
    """Calls axons in the name of one hotkey. Use one per hotkey: it keeps that hotkey's nonces unique."""

    def __init__(
        self,
        signer: Signer,
        *,
        now_ns: Callable[[], int],
        streams: int = 8,
        idle_s: float = 90.0,
        shaper: Shaper | None = None,
    ) -> None:
        """
        Args:
            signer: the hotkey.
            now_ns: Unix time in nanoseconds; nonces are made from it.
            streams: connections per neighbour, and calls in flight to it.
            idle_s: seconds a connection is kept warm without traffic.
            shaper: the emulated link that calls pass through, for tests.
        """
        self._signer = signer
        self._now_ns = now_ns
        self.streams = streams
        """Calls in flight to one neighbour."""
        self._idle_s = idle_s
        self.shaper = shaper
        self._session: aiohttp.ClientSession | None = None
        self._gates: dict[str, asyncio.Semaphore] = {}
        self._turns: dict[str, asyncio.Lock] = {}
        self._urls: dict[tuple[str, str], URL] = {}
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
        """Open the session; connections are made when first needed."""
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=0,
                limit_per_host=self.streams,
                keepalive_timeout=self._idle_s,
                socket_factory=sockets.outgoing,
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None),  # `call` has its own deadline
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding"),
            auto_decompress=False,
        )

    async def stop(self) -> None:
        """Close every connection; calls in flight end as `Unreachable`."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

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
    ) -> tuple[S, dict[str, torch.Tensor]]:
        """Send one message and wait for its reply.

        Args:
            endpoint: ``http://host:port`` of the axon.
            receiver: its hotkey; nobody else can use the request.
            tensors: in host memory; not to be written to until the call ends.
            reply: model of the reply's fields.
            reply_specs: exactly the tensors of the reply, fixed or as a function of its fields.
            max_reply_bytes: bound for the reply, needed where its specs depend on its fields.
            deadline: seconds from now that everything may take, waiting for a stream included.

        Raises:
            Refused: the subclass that the axon raised.
            Unreachable: no complete answer in time.
            BadReply: the answer is not what was asked for.
            ValueError: the message cannot be sent at all, see `synapse.encode`.
        """
        if self._session is None or not message.route:
            raise ValueError("call start() first" if message.route else f"{type(message).__name__} has no route")
        if max_reply_bytes is None:
            if callable(reply_specs):
                raise ValueError(f"max_reply_bytes is missing for {reply.__name__}, whose specs depend on its fields")
            max_reply_bytes = synapse.max_blob_bytes(reply_specs)
        traffic = self.counters.setdefault(message.route, Traffic())
        traffic.calls += 1
        parts = synapse.encode(message, tensors)
        gate = self._gates.setdefault(endpoint, asyncio.Semaphore(self.streams))
        try:
            async with asyncio.timeout(deadline):
                large = synapse.size_of(parts) >= _HASH_OFF_LOOP
                digest = await asyncio.to_thread(hashing.digest, *parts) if large else hashing.digest(*parts)
                async with gate:
                    blob = await self._exchange(
                        endpoint, receiver, message.route, parts, digest, max_reply_bytes, traffic
                    )
            fields, received = synapse.decode(reply, blob, reply_specs)
        except TimeoutError:
            traffic.failed += 1
            raise Silent(
                f"{endpoint} gave no answer to {message.route} within {deadline:g} s; "
                "try a sibling or a longer deadline"
            ) from None
        except (aiohttp.ClientError, OSError) as error:
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

    async def _exchange(
        self,
        endpoint: str,
        receiver: str,
        route: str,
        parts: Sequence[memoryview],
        digest: bytes,
        max_reply_bytes: int,
        traffic: Traffic,
    ) -> memoryview:
        if self._session is None:
            raise Unreachable("this dendrite was stopped before the call was sent")
        url = self._urls.get((endpoint, route))
        if url is None:
            url = self._urls[endpoint, route] = URL(f"{endpoint}/{route}")
        size = synapse.size_of(parts)
        shaper = None if self.shaper is None else self.shaper.towards(receiver)
        up = down = None
        if shaper is not None:
            await shaper.depart(size)
            up, down = shaper.up, shaper.down
        self._last_nonce = max(self._now_ns(), self._last_nonce + 1)
        headers = auth.sign(self._signer, path=f"/{route}", digest=digest, receiver=receiver, nonce_ns=self._last_nonce)
        if size <= synapse.SLICE and up is None:
            data: bytes | _Parts = b"".join(parts)
        else:
            data = _Parts(parts, up, self._turns.setdefault(endpoint, asyncio.Lock()))
        async with self._session.post(url, data=data, headers=headers, allow_redirects=False) as response:
            traffic.sent += size
            limit = max_reply_bytes if response.status == 200 else _ERROR_LIMIT
            blob = await _read(response, limit, down)
            traffic.received += blob.nbytes
            if shaper is not None:
                await shaper.arrive(blob.nbytes)
            if response.status == 200:
                return blob
            error = from_wire(response.status, bytes(blob))
        if isinstance(error, Refused):
            error.peer = endpoint
            raise error
        raise BadReply(f"{endpoint} {error}")


async def _read(response: aiohttp.ClientResponse, limit: int, down: Pipe | None) -> memoryview:
    size = response.content_length
    if size is None or size > limit:
        response.close()
        raise BadReply(f"{response.url.origin()} announced a reply of {size} bytes, limit {limit}")
    blob = np.empty(size, dtype=np.uint8).data
    filled = 0
    stream = None if down is None else down.stream()
    while filled < size:
        chunk = await response.content.readany()
        if stream is not None:
            await stream.carry(len(chunk))
        if not chunk:
            raise Unreachable(f"{response.url.origin()} closed after {filled} of {size} bytes; try a sibling")
        blob[filled : filled + len(chunk)] = chunk
        filled += len(chunk)
    return blob


class _Parts(Payload):
    """A request body that is written from where it lies, when those before it have left for the same neighbour.

    Side by side they would all arrive last: four tensors that share a link take four times as long, each of them and on
    every hop. The other streams are for replies that are under way.
    """

    _autoclose = True

    def __init__(self, parts: Sequence[memoryview], up: Pipe | None, turn: asyncio.Lock) -> None:
        super().__init__(parts)
        self._parts = parts
        self._up = up
        self._turn = turn
        self._size = synapse.size_of(parts)

    async def write(self, writer: AbstractStreamWriter) -> None:
        async with self._turn:
            if self._up is None:
                for piece in synapse.slices(self._parts):
                    await writer.write(piece)
                return
            stream = self._up.stream()
            for piece in synapse.slices(self._parts, size=TURN):
                await stream.carry(piece.nbytes)
                await writer.write(piece)

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:  # noqa: ARG002
        raise TypeError("a body of tensors has no text")
