"""Somebody on the way who records requests and sends them again: later, or before the first one is there.

TCP does not repeat or reorder what an application sends, so only a hand does. This one carries all lines, sees every
request in plain HTTP with its signature, holds some back and sends copies from a machine of its own. What was answered
to a request and to its copies is kept: it may be taken once.
"""

from __future__ import annotations

import asyncio
import math
import socket
from collections import deque
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import numpy as np

from scripts.sim.wire import Host, Network, SimSocket
from subnet.transport import auth, http1
from subnet.transport.connection import Connection
from subnet.transport.http1 import END, BadHead

ASKED: Final = b"POST "
OTHERWISE: Final = b"GET "
ANSWERED: Final = b"HTTP/1.1 "
LATER_SECONDS: Final = (0.05, 30.0)
"""After which a copy is sent: also when the nonce is too old."""
HELD_SHARE: Final = 0.2
"""Of the requests that are repeated: the copy comes first."""
HELD_SECONDS: Final = (0.5, 3.0)
AGAIN_SHARE: Final = 0.3
"""Of the copies, which are followed by another."""
PATIENCE: Final = 10.0


@dataclass(eq=False)
class Request:
    """One that was sent, and what became of it and of its copies."""

    nonce: str = ""
    statuses: list[int] = field(default_factory=list)
    """HTTP's, in the order of the answers."""
    repeats: bool = False
    held: float = 0.0
    _raw: bytearray = field(default_factory=bytearray)
    _missing: int = 0

    @classmethod
    def begin(cls, piece: memoryview) -> Request:
        raw = bytes(piece)
        end = raw.find(END) + len(END)
        try:
            head = http1.parse_request(raw[:end])
        except BadHead:
            return cls()
        return cls(nonce=auth.stated_nonce(head.fields), _missing=(head.length or 0) + end)

    def go_on(self, piece: memoryview) -> bool:
        """Whether that was the last of it."""
        if self.repeats:
            self._raw += piece
        self._missing -= piece.nbytes
        return self._missing <= 0

    def take(self) -> bytes:
        """What was sent, which is not needed any more."""
        raw, self._raw = bytes(self._raw), bytearray()
        return raw


class Repeater:
    """See above; a `Tap` of the network."""

    def __init__(self, network: Network, host: Host, generator: np.random.Generator) -> None:
        self._network = network
        self._host = host
        self._sockets = network.sockets(host)
        self._generator = generator
        self.shares: dict[str, float] = {}
        """Of the requests to each address, those that it repeats now."""
        self.repeated: list[Request] = []
        self.copies = 0
        self._asked: dict[SimSocket, deque[Request]] = {}
        """Requests on each stream that have no answer yet, by the asking end."""
        self._open: dict[SimSocket, Request] = {}
        """What is under way on each stream."""

    def passes(self, sender: SimSocket, piece: memoryview) -> float:
        """See `Tap`."""
        if sender.host is self._host or sender.peer is None:
            return 0.0
        begins = bytes(piece[: len(ANSWERED)])
        if begins == ANSWERED:
            waiting = self._asked.get(sender.peer)
            if waiting:
                waiting.popleft().statuses.append(int(bytes(piece[len(ANSWERED) : len(ANSWERED) + 3])))
            return 0.0
        if begins.startswith(ASKED):
            self._open[sender] = Request.begin(piece)
            self._asked.setdefault(sender, deque()).append(self._open[sender])
            self._draw(self._open[sender], sender.peer.host)
        elif begins.startswith(OTHERWISE):
            self._asked.setdefault(sender, deque()).append(Request())
        request = self._open.get(sender)
        if request is None:
            return 0.0
        if request.go_on(piece):
            del self._open[sender]
            if request.repeats:
                self._schedule(request, sender.peer.host)
        return request.held

    def _draw(self, request: Request, receiver: Host) -> None:
        share = self.shares.get(receiver.address, 0.0)
        request.repeats = bool(request.nonce) and share > 0.0 and bool(self._generator.random() < share)
        if request.repeats:
            self.repeated.append(request)
            if self._generator.random() < HELD_SHARE:
                request.held = float(self._generator.uniform(*HELD_SECONDS))

    def _schedule(self, request: Request, receiver: Host) -> None:
        raw, now = request.take(), self._network.loop.time()
        least, most = LATER_SECONDS
        again = True
        while again:
            wait = least * math.exp(math.log(most / least) * float(self._generator.random()))
            self._network.at(now + (0.0 if request.held else wait), partial(self._send, request, raw, receiver))
            again = bool(self._generator.random() < AGAIN_SHARE)

    def _send(self, request: Request, raw: bytes, receiver: Host) -> None:
        if receiver.listener is not None:
            self.copies += 1
            self._network.loop.create_task(self._copy(request, raw, (receiver.address, receiver.listener.port)))

    async def _copy(self, request: Request, raw: bytes, address: tuple[str, int]) -> None:
        connection = Connection(self._sockets.outgoing(socket.AF_INET, address[0]), address[0])
        try:
            async with asyncio.timeout(PATIENCE):
                await connection.connect(address)
                await connection.write([raw])
                head = await connection.head()
            if head is not None:
                request.statuses.append(http1.parse_response(head).status)
        except (OSError, BadHead):  # also a `TimeoutError`: it waits for no one
            return
        finally:
            connection.close()
