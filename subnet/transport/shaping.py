"""An emulated link: the real node code over loopback, as slow and lossy as a home connection.

`Dendrite` and `Axon` of one node share one `Shaper`. It stands for the node's line to everybody or, on demand, for a
line of its own to each neighbour. What is modelled, all of it on top of what loopback does:

* Bandwidth. An uplink and a downlink, full duplex. Bytes leave one after the other; streams that are open at a time
  take turns, so a small push passes through a large payload instead of waiting behind it. Bodies are
  paced while they are written and read: a transfer between two shaped nodes takes as long as the slower side needs,
  plus one turn.
* Latency. Once on the request and once on the reply, at the caller. Streams are warm: no handshake, no slow start.
* Loss, of segments of `SEGMENT` bytes, independent of each other. Every lost segment is sent again and takes its share
  of the bandwidth. A sender like BBR does not slow down for it, so what else a message waits for is only a loss near
  its end: one of the last `TAIL` segments is missed by nobody before the retransmission timeout, max(200 ms, 2 round
  trips), doubled each time the repeat is lost too; another one of the last round trip's segments costs one round trip
  more. After `REPEATS` lost repeats the connection is given up: `Unreachable`.

Time is the running loop's, chance is the generator's that was handed in.
"""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass
from typing import Final

import numpy as np

from subnet.quantities import QuantityError, parse, parse_bandwidth
from subnet.transport.errors import Unreachable

TURN: Final = 64 * 1024
TURN_S: Final = 0.005
"""A stream sends so many bytes, or for so many seconds if that is more, before another has its turn."""
SEGMENT: Final = 1460
TAIL: Final = 3
"""Segments after a loss that show the sender it happened (duplicate acknowledgements)."""
REPEATS: Final = 6
RTO_FLOOR: Final = 0.2
LATE: Final = 0.02
"""Seconds by which a stream that was woken late may catch up."""

_LATENCY: Final = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
_LOSS: Final = {"%": 0.01}


@dataclass(frozen=True, slots=True)
class Link:
    """What stands between a node and everybody else."""

    latency_s: float = 0.0
    """One way, in seconds."""
    up_bps: float = math.inf
    """Bits per second that the node can send."""
    down_bps: float = math.inf
    """Bits per second that it can receive."""
    loss: float = 0.0
    """Share of segments lost, 0 to 1."""
    per_neighbour: bool = False
    """Whether each neighbour is reached through a link of its own. The sender's end alone sets the pace of such a one,
    so both ends are to be emulated; `down_bps` does not count."""

    @classmethod
    def parse(cls, *, latency: str | None = None, bandwidth: str | None = None, loss: str | None = None) -> Link | None:
        """The link that these texts describe; None if there is none. Raises `QuantityError`."""
        if latency is None and bandwidth is None and loss is None:
            return None
        bps = math.inf if bandwidth is None else parse_bandwidth("bandwidth", bandwidth)
        return cls(
            latency_s=0.0 if latency is None else parse_latency(latency),
            up_bps=bps,
            down_bps=bps,
            loss=0.0 if loss is None else parse_loss(loss),
        )

    @property
    def round_trip_s(self) -> float:
        return 2 * self.latency_s

    @property
    def timeout_s(self) -> float:
        """Retransmission timeout."""
        return max(RTO_FLOOR, 2 * self.round_trip_s)

    def flight(self, bandwidth_bps: float) -> int:
        """Segments under way at a time in a direction of this bandwidth: those of one round trip."""
        if math.isinf(bandwidth_bps):
            return 1 << 31
        return max(10, math.ceil(bandwidth_bps * self.round_trip_s / 8 / SEGMENT))


def parse_latency(text: str) -> float:
    """Seconds from a text like 50ms. Raises `QuantityError`."""
    return parse("latency", text, _LATENCY, example="50ms")


def parse_loss(text: str) -> float:
    """A share from 0 to 1 from a text like 0.5%. Raises `QuantityError`."""
    loss = parse("loss", text, _LOSS, example="0.5%")
    if loss > 1:
        raise QuantityError(f"--loss {text!r} is more than everything: give 0% to 100%, in the form 0.5%")
    return loss


class Pipe:
    """One direction of a link: bytes pass one after the other, streams take turns."""

    def __init__(self, bandwidth_bps: float) -> None:
        self.bandwidth_bps = bandwidth_bps
        self.turn = TURN if math.isinf(bandwidth_bps) else max(TURN, int(bandwidth_bps * TURN_S / 8))
        """Bytes."""
        self._seconds_per_byte = 8 / bandwidth_bps
        self._turn = asyncio.Lock()  # wakes its waiters first come, first served: the turns
        self._free_at = -math.inf

    def stream(self) -> Stream:
        """A transfer that begins now."""
        return Stream(self)

    async def carry(self, size: int, ready: float) -> float:
        """Pass `size` bytes, at most a turn, that were there at `ready`; returns when the last one has passed."""
        if not self._seconds_per_byte:
            return ready
        loop = asyncio.get_running_loop()
        async with self._turn:
            self._free_at = max(self._free_at, ready) + size * self._seconds_per_byte
            free_at = self._free_at
            if free_at > loop.time():
                await asyncio.sleep(free_at - loop.time())
            return free_at


class Stream:
    """The bytes of one transfer, in order."""

    def __init__(self, pipe: Pipe) -> None:
        self._pipe = pipe
        self._ready = -math.inf

    async def carry(self, size: int) -> None:
        """Wait until the next `size` bytes have passed."""
        now = asyncio.get_running_loop().time()
        # Timers fire late. What follows at once may make up for it; what begins anew, or was held up, may not.
        self._ready = max(self._ready, now - LATE) if self._ready > -math.inf else now
        while size > 0:
            self._ready = await self._pipe.carry(min(size, self._pipe.turn), self._ready)
            size -= self._pipe.turn


class Shaper:
    """One node's link. Share it between everything that speaks for that node."""

    def __init__(self, link: Link, generator: np.random.Generator) -> None:
        self.link = link
        self._generator = generator
        self._neighbours: dict[str, Shaper] = {}
        self.up = Pipe(link.up_bps)
        self.down = Pipe(math.inf if link.per_neighbour else link.down_bps)

    def towards(self, neighbour: str) -> Shaper:
        """What stands between this node and the one of that hotkey."""
        if not self.link.per_neighbour:
            return self
        found = self._neighbours.get(neighbour)
        if found is None:
            found = self._neighbours[neighbour] = Shaper(self.link, self._generator)
        return found

    async def depart(self, size: int) -> None:
        """What a request of `size` bytes waits for, its own passage through `up` apart. Raises `Unreachable`."""
        await self._cross(self.up, size)

    async def arrive(self, size: int) -> None:
        """What a reply of `size` bytes waits for, its own passage through `down` apart. Raises `Unreachable`."""
        await self._cross(self.down, size)

    async def _cross(self, pipe: Pipe, size: int) -> None:
        lost, delay = self._draw(math.ceil(size / SEGMENT) or 1, self.link.flight(pipe.bandwidth_bps))
        await pipe.stream().carry(lost * SEGMENT)
        if delay is None:
            await asyncio.sleep(self.link.latency_s + self.link.timeout_s * (2**REPEATS - 1))
            raise Unreachable(
                f"the emulated link lost one segment {REPEATS + 1} times (--loss {self.link.loss:.3%}); try a sibling"
            )
        if self.link.latency_s + delay > 0:
            await asyncio.sleep(self.link.latency_s + delay)

    def _draw(self, segments: int, flight: int) -> tuple[int, float | None]:
        """Of a message: segments lost, and seconds that its end is late, None if it never arrives. `flight` segments
        are under way at a time."""
        if not self.link.loss:
            return 0, 0.0
        tail = min(segments, TAIL)
        flight = min(segments, flight)
        before, near, last = (
            int(self._generator.binomial(count, self.link.loss)) for count in (segments - flight, flight - tail, tail)
        )
        lost = before + near + last
        if not last:
            return lost, self.link.round_trip_s if near else 0.0
        repeats = 0
        while repeats < REPEATS and self._generator.random() < self.link.loss:
            repeats += 1
        return lost + repeats, None if repeats == REPEATS else self.link.timeout_s * (2 ** (repeats + 1) - 1)
