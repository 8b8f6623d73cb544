"""Links: how long a message takes from one node to another while others use the same lines.

A line sends its messages one after the other, as they come. Downstream a message may pass through while it still
arrives, so alone it takes bytes / min(up, down) + latency. While a merge has streams open on a line these take turns
with each message, which takes so many times longer.
"""

from __future__ import annotations

from collections.abc import Callable

from scripts.simulate.events import Clock
from scripts.simulate.setting import Wires


class Port:
    """One node's lines."""

    __slots__ = ("down", "down_free", "down_streams", "sent", "up", "up_busy", "up_free", "up_streams")

    def __init__(self, *, up: float, down: float) -> None:
        """Bits per second."""
        self.up = 8 / up
        """Seconds per byte."""
        self.down = 8 / down
        self.up_free = 0.0
        """When what has been handed to the uplink will have left."""
        self.down_free = 0.0
        self.up_streams = 0
        """Of a merge, open now."""
        self.down_streams = 0
        self.up_busy = 0.0
        """Seconds for which microbatches have used the uplink."""
        self.sent = 0


class Network:
    """Carries messages between ports."""

    def __init__(self, clock: Clock, *, latency: float, wires: Wires) -> None:
        """`latency` is seconds one way."""
        self.latency = latency
        self._clock = clock
        self._pairs: dict[tuple[Port, Port], Port] | None = {} if wires is Wires.PAIR else None

    def send(self, source: Port, target: Port, size: int, arrived: Callable[[], None]) -> None:
        """Send `size` bytes now; `arrived` is called when the last of them is there."""
        clock, line = self._clock, source
        if self._pairs is not None:
            line = target = _between(self._pairs, source, target)
        start = max(clock.now, line.up_free)
        busy = size * line.up * (1 + line.up_streams)
        line.up_free = start + busy
        source.up_busy += busy
        source.sent += size
        last = line.up_free + self.latency
        if target.down:
            clock.at(start + self.latency, self._arriving, target, size, last, arrived)
        else:
            clock.at(last, arrived)

    def _arriving(self, target: Port, size: int, last: float, arrived: Callable[[], None]) -> None:
        """The first byte is there; `last` is when the last one can be."""
        clock = self._clock
        target.down_free = max(clock.now, target.down_free) + size * target.down * (1 + target.down_streams)
        clock.at(max(last, target.down_free), arrived)


def _between(pairs: dict[tuple[Port, Port], Port], source: Port, target: Port) -> Port:
    """The line from one to the other, in a network of pairs."""
    line = pairs.get((source, target))
    if line is None:
        line = pairs[source, target] = Port(up=8 / source.up, down=8 / target.down)
    return line
