"""The internet of a simulation: stream sockets as the transport uses them, between hosts whose lines have a seed.

`Axon` and `Dendrite` run as they are; only their sockets come from here (`subnet.transport.sockets.Sockets`). A stream
delivers its bytes in order and once, as TCP does, so what the line loses, repeats or reorders is time: a lost segment
comes a retransmission later, and what follows it waits. What applications see besides is here too: connections refused
and reset, hosts that say nothing, partitions in one direction or both, streams that stand still and go on.
"""

from __future__ import annotations

import errno
import os
import socket
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextvars import Context
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, Protocol, cast

import numpy as np

from scripts.sim.clock import FIRST_NUMBER, LIFE, Life, SimLoop
from subnet.transport.errors import PortTaken
from subnet.transport.sockets import Sockets

CONTROL: Final = 60
"""Bytes of a segment without data."""
CHUNK: Final = 64 * 1024
BUFFER: Final = 256 * 1024
"""Bytes of a stream that may be sent and not yet on the line."""
WINDOW: Final = 1024 * 1024
"""Bytes that may have arrived and not be read."""
AT_ONCE: Final = 0.001
"""Seconds of a line's time that are not worth a turn of the loop."""
RETRANSMISSION: Final = 0.2
SYN_SECONDS: Final = 20.0
"""After which a connection that nobody answers is given up; and a stream in which nothing is acknowledged."""


@dataclass(frozen=True, slots=True)
class Line:
    """What lies between a host and the others."""

    latency: float = 0.03
    """Seconds to the middle of the net: half of a one-way delay."""
    jitter: float = 0.005
    bandwidth: float = 200e6 / 8
    """Bytes per second, each way."""
    loss: float = 0.0
    """Share of chunks that come a retransmission later."""


@dataclass(eq=False)
class Host:
    """A machine: its address, its line, and which process has the port."""

    address: str
    line: Line
    up_free: float = 0.0
    """When what was sent before has left."""
    down_free: float = 0.0
    dark: bool = False
    """It says nothing, as without current."""
    listener: Listener | None = None


@dataclass
class Counts:
    """What became of what was sent."""

    connections: int = 0
    refused: int = 0
    resets: int = 0
    chunks: int = 0
    bytes: int = 0
    lost: int = 0
    held: int = 0
    """Chunks that a partition stopped for a while."""


class Tap(Protocol):
    """Somebody on the way between all hosts."""

    def passes(self, sender: SimSocket, piece: memoryview) -> float:
        """Look at what is being sent; seconds for which it is held back."""


@dataclass(eq=False)
class Network:
    """All hosts and what is between them."""

    loop: SimLoop
    generator: np.random.Generator
    hosts: dict[str, Host] = field(default_factory=dict)
    blocked: set[tuple[str, str]] = field(default_factory=set)
    """Pairs of addresses between which nothing passes, from the first to the second."""
    counts: Counts = field(default_factory=Counts)
    tap: Tap | None = None
    _held: list[tuple[Host, Host, Callable[[], None]]] = field(default_factory=list)
    _next: int = FIRST_NUMBER
    _ports: int = 40_000

    def host(self, address: str, line: Line) -> Host:
        host = self.hosts[address] = Host(address, line)
        return host

    def sockets(self, host: Host) -> Sockets:
        """What a node on this host makes its sockets with."""
        return Sockets(
            outgoing=lambda _family, _to: cast("socket.socket", SimSocket(self, host)),
            listening=lambda _address, port: cast("socket.socket", Listener(self, host, port)),
        )

    def number(self) -> int:
        self._next += 1
        return self._next

    def port(self) -> int:
        self._ports += 1
        return self._ports

    def passes(self, source: Host, target: Host) -> bool:
        return not source.dark and not target.dark and (source.address, target.address) not in self.blocked

    def carry(
        self,
        source: Host,
        target: Host,
        size: int,
        left: Callable[[], None],
        came: Callable[[], None],
        *,
        held: float = 0.0,
    ) -> None:
        """Take so many bytes from one host to another: `left` when they are on the line, `came` when they are there,
        `held` seconds later than they could be."""
        now = self.loop.time()
        self.counts.chunks += 1
        self.counts.bytes += size
        seconds = size / source.line.bandwidth
        source.up_free = max(source.up_free, now) + seconds
        if source.up_free - now < AT_ONCE:
            left()
            self._cross(source, target, size, came, source.up_free - now + held)
        else:

            def gone() -> None:
                left()
                self._cross(source, target, size, came, held)

            self.at(source.up_free, gone)

    def _cross(self, source: Host, target: Host, size: int, came: Callable[[], None], wait: float = 0.0) -> None:
        if not self.passes(source, target):
            self.counts.held += 1
            self._held.append((source, target, lambda: self._cross(source, target, size, came)))
            return
        delay = source.line.latency + target.line.latency
        delay += self.generator.random() * (source.line.jitter + target.line.jitter)
        loss = source.line.loss + target.line.loss - source.line.loss * target.line.loss
        while self.generator.random() < loss:
            self.counts.lost += 1
            delay += max(RETRANSMISSION, 2 * delay)

        def arrive() -> None:
            now = self.loop.time()
            target.down_free = max(target.down_free, now) + size / target.line.bandwidth
            if target.down_free - now < AT_ONCE:
                came()
            else:
                self.at(target.down_free, came)

        self.at(self.loop.time() + wait + delay, arrive)

    def between(self, blocked: Iterable[tuple[str, str]]) -> None:
        """Nothing passes between these pairs from now on, and between all others it does."""
        self.blocked = set(blocked)
        self.heal()

    def heal(self) -> None:
        """Look again at what was held: a sender tries for as long as it has patience."""
        held, self._held = self._held, []
        for source, target, again in held:
            if self.passes(source, target):
                self.at(self.loop.time() + self.generator.random() * RETRANSMISSION, again)
            else:
                self._held.append((source, target, again))

    def at(self, when: float, call: Callable[[], object]) -> None:
        """What the net does is part of nobody's life."""
        token = LIFE.set(None)
        try:
            self.loop.call_at(when, call)
        finally:
            LIFE.reset(token)

    def kill(self, host: Host, life: Life) -> None:
        """A process is gone: the system resets its connections, unless the whole host is dark."""
        for end in [end for end in self.loop.ends.values() if isinstance(end, _Descriptor) and end.life is life]:
            end.vanish(told=not host.dark)


class _Descriptor:
    """What the loop knows of a simulated socket: who waits for it to be readable or writable."""

    def __init__(self, network: Network, host: Host) -> None:
        self.network = network
        self.host = host
        self.life = LIFE.get()
        self.waiters: dict[str, tuple[Callable[..., object], tuple[Any, ...], Context]] = {}
        self.woken: set[str] = set()
        self._number = network.number()
        network.loop.ends[self._number] = self

    def fileno(self) -> int:
        return self._number

    def forget(self) -> None:
        self.network.loop.ends.pop(self._number, None)
        self._number = -1
        self.waiters.clear()

    def vanish(self, *, told: bool) -> None:
        """Its process is gone; `told` if its system says so."""
        raise NotImplementedError

    def ready(self, side: str) -> bool:
        raise NotImplementedError

    def stir(self, *, at_once: bool = False) -> None:
        """Something may be possible now: whoever waits for it is called, again for as long as it is."""
        for side in tuple(self.waiters):
            if self.ready(side):
                self.network.loop.wake(self, side, at_once=at_once)


class Listener(_Descriptor):
    """A bound socket."""

    def __init__(self, network: Network, host: Host, port: int) -> None:
        if host.listener is not None:
            raise PortTaken(f"cannot listen on {host.address} port {port}: choose a free one with --port")
        super().__init__(network, host)
        self.port = port or network.port()
        self.waiting: deque[SimSocket] = deque()
        host.listener = self

    def getsockname(self) -> tuple[str, int]:
        return self.host.address, self.port

    def ready(self, side: str) -> bool:
        return side == "reader" and bool(self.waiting)

    def accept(self) -> tuple[SimSocket, tuple[str, int]]:
        if not self.waiting:
            raise BlockingIOError
        sock = self.waiting.popleft()
        sock.life = LIFE.get()
        assert sock.peer is not None  # noqa: S101 - it was connected
        return sock, (sock.peer.host.address, self.network.port())

    def close(self) -> None:
        if self._number < 0:
            return
        if self.host.listener is self:
            self.host.listener = None
        for sock in self.waiting:
            sock.vanish(told=True)
        self.forget()

    def vanish(self, *, told: bool) -> None:  # noqa: ARG002 - who comes now is refused
        self.close()


class SimSocket(_Descriptor):
    """One end of a stream: what `subnet.transport.connection.Connection` uses of a socket."""

    def __init__(self, network: Network, host: Host) -> None:
        super().__init__(network, host)
        self.peer: SimSocket | None = None
        self._connected = False
        self._error = 0
        self._got: deque[memoryview] = deque()
        self._unread = 0
        self._unsent = 0
        self._on_the_way = 0
        """Bytes that have left and are not there."""
        self._ended = False
        """The peer sends no more."""
        self._wanted = 1
        self._last = 0
        """Number of the chunk sent last, and of the one that is due next at the peer."""
        self._due = 1
        self._early: dict[int, Callable[[], None]] = {}
        self._since: float | None = None
        """Since when nothing of what was sent was acknowledged."""
        self._looking = False

    # -- being connected --------------------------------------------------------------------------------------------

    def connect(self, address: tuple[str, int]) -> None:
        network, loop = self.network, self.network.loop
        target = network.hosts.get(address[0])
        if target is None:
            raise OSError(errno.EHOSTUNREACH, os.strerror(errno.EHOSTUNREACH))
        network.counts.connections += 1

        def asked() -> None:
            listener = target.listener
            if self._number < 0 or self._error:
                return
            if listener is None or listener.port != address[1]:
                network.carry(target, self.host, CONTROL, _nothing, partial(self._refused, errno.ECONNREFUSED))
                return
            token = LIFE.set(listener.life)
            other = SimSocket(network, target)
            LIFE.reset(token)
            other.peer, self.peer = self, other
            other._connected = True
            listener.waiting.append(other)
            listener.stir()
            network.carry(target, self.host, CONTROL, _nothing, self._established)

        network.carry(self.host, target, CONTROL, _nothing, asked)
        network.at(loop.time() + SYN_SECONDS, self._given_up)
        raise BlockingIOError

    def _established(self) -> None:
        if self._number >= 0 and not self._error:
            self._connected = True
            self.stir()
        elif self.peer is not None:
            self._tell(self.peer, errno.ECONNRESET)

    def _refused(self, number: int) -> None:
        if self._number >= 0 and not self._connected and not self._error:
            self.network.counts.refused += 1
            self._error = number
            self.stir()

    def _given_up(self) -> None:
        self._refused(errno.ETIMEDOUT)

    def setsockopt(self, _level: int, option: int, value: object) -> None:
        if option == socket.SO_RCVLOWAT:
            self._wanted = cast("int", value)

    def getsockopt(self, _level: int, _option: int) -> int:
        return self._error

    # -- reading ----------------------------------------------------------------------------------------------------

    def ready(self, side: str) -> bool:
        if self._error:
            return True
        if side == "writer":
            return self._connected and self._room > 0
        return self._ended or self._unread >= min(self._wanted, WINDOW // 2)

    def recv_into(self, into: memoryview) -> int:
        self._check()
        if not self._got:
            if self._ended:
                return 0
            raise BlockingIOError
        filled = 0
        while self._got and filled < into.nbytes:
            first = self._got[0]
            count = min(first.nbytes, into.nbytes - filled)
            into[filled : filled + count] = first[:count]
            filled += count
            if count == first.nbytes:
                self._got.popleft()
            else:
                self._got[0] = first[count:]
        self._unread -= filled
        if self.peer is not None:
            self.peer.stir()
        return filled

    def recv(self, count: int, _flags: int) -> bytes:
        """Look at what is there, without taking it."""
        self._check()
        if self._got:
            return bytes(self._got[0][:count])
        if self._ended:
            return b""
        raise BlockingIOError

    # -- writing ----------------------------------------------------------------------------------------------------

    @property
    def _room(self) -> int:
        peer = self.peer
        if peer is None:
            return 0
        return min(BUFFER - self._unsent, WINDOW - self._on_the_way - self._unsent - peer._unread)

    def sendmsg(self, parts: Sequence[memoryview]) -> int:
        self._check()
        if self.peer is None:
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
        data, room = b"".join(bytes(part) for part in parts), self._room
        if room <= 0:
            raise BlockingIOError
        taken = memoryview(data[:room])
        for start in range(0, taken.nbytes, CHUNK):
            self._send(taken[start : start + CHUNK])
        return taken.nbytes

    def _send(self, piece: memoryview) -> None:
        self._last += 1
        number, size, peer = self._last, piece.nbytes, self.peer
        assert peer is not None  # noqa: S101 - `sendmsg` looked
        self._unsent += size
        if self._since is None:
            self._since = self.network.loop.time()
            if not self._looking:
                self._looking = True
                self.network.at(self._since + SYN_SECONDS, self._look)

        def left() -> None:
            self._unsent -= size
            self._on_the_way += size
            self.stir()

        def there() -> None:
            self._on_the_way -= size
            peer.take(piece)
            self._since = self.network.loop.time() if self._on_the_way or self._unsent else None
            self.stir()

        tap = self.network.tap
        self._in_order(number, size, left, there, held=0.0 if tap is None else tap.passes(self, piece))

    def _in_order(
        self, number: int, size: int, left: Callable[[], None], there: Callable[[], None], *, held: float = 0.0
    ) -> None:
        """What is sent is there after all that was sent before."""
        peer = self.peer
        assert peer is not None  # noqa: S101 - there is one to send to

        def came() -> None:
            self._early[number] = there
            while self._due in self._early:
                self._early.pop(self._due)()
                self._due += 1

        self.network.carry(self.host, peer.host, size, left, came, held=held)

    def _look(self) -> None:
        """Nothing was acknowledged for too long: the system ends the stream."""
        self._looking = False
        if self._number < 0 or self._since is None:
            return
        self._looking = True
        until = self._since + SYN_SECONDS
        if self.network.loop.time() < until:
            self.network.at(until, self._look)
        else:
            self.fail(errno.ETIMEDOUT)

    def take(self, piece: memoryview) -> None:
        """Bytes have come."""
        if self._number < 0 or (self.life is not None and self.life.ended):
            if self.peer is not None and not self.host.dark:
                self._tell(self.peer, errno.ECONNRESET)
            return
        self._got.append(piece)
        self._unread += piece.nbytes
        self.stir(at_once=True)

    # -- the end ----------------------------------------------------------------------------------------------------

    def fail(self, number: int) -> None:
        """The stream is broken."""
        if self._number >= 0 and not self._error:
            self.network.counts.resets += 1
            self._error = number
            self.stir()

    def _tell(self, peer: SimSocket, number: int) -> None:
        self.network.carry(self.host, peer.host, CONTROL, _nothing, lambda: peer.fail(number))

    def _check(self) -> None:
        if self._error:
            raise OSError(self._error, os.strerror(self._error))

    def close(self) -> None:
        """Tell the peer that nothing more comes; by a reset, where something unread is left."""
        if self._number < 0:
            return
        peer = self.peer
        if peer is not None and self._connected and not self._error:
            if self._got:
                self._tell(peer, errno.ECONNRESET)
            else:
                self._last += 1
                self._in_order(self._last, CONTROL, _nothing, peer.finish)
        self.forget()

    def finish(self) -> None:
        """The peer has closed."""
        self._ended = True
        self.stir()

    def vanish(self, *, told: bool) -> None:
        if self._number >= 0 and told and self.peer is not None:
            self._tell(self.peer, errno.ECONNRESET)
        self.forget()


def _nothing() -> None:
    pass
