"""Who may connect, and stay connected, before anything is known of them.

What a caller may ask follows from its signature. A connection comes before that, and costs a file, memory and turns of
the loop whoever opens it. So connections that have not carried an admitted request yet, those of strangers, are bounded
in number, and from each address in how fast they come. What goes beyond is closed at once, which costs next to nothing;
where there are too many in all, the oldest of the address that has most of them goes. Neighbours' connections are
strangers' for a round trip, and then nobody here can end them.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Hashable
from typing import Final, Generic, TypeVar

T = TypeVar("T", bound=Hashable)

STRANGERS: Final = 512
"""Connections of strangers at a time, from all addresses."""
BURST: Final = 512
"""New connections from one address at once: the miners of a site behind one address, eight streams each."""
RATE: Final = 100.0
"""And per second afterwards."""
SOURCES: Final = 4096
"""Addresses that are remembered."""


def source_of(address: str) -> str:
    """What counts as one address: of IPv6 the /64, which is what one machine is given."""
    if ":" not in address:
        return address
    six = ipaddress.IPv6Address(address)
    return str(six.ipv4_mapped or ipaddress.IPv6Network((six.packed, 64), strict=False))


class Crowd(Generic[T]):
    """The strangers at one axon; `T` is what stands for a connection. Pure: times are handed in, seconds."""

    def __init__(self, *, strangers: int = STRANGERS, burst: int = BURST, rate: float = RATE) -> None:
        self._strangers = strangers
        self._rate = rate
        self._ahead = (burst - 0.5) / rate
        self._due: dict[str, float] = {}
        """When each address, had it kept to its rate, would have come as often as it has (GCRA, ITU-T I.371)."""
        self._of: dict[T, str] = {}
        self._by_source: dict[str, dict[T, None]] = {}
        """Oldest first."""

    def __len__(self) -> int:
        return len(self._of)

    def may_enter(self, source: str, now: float) -> bool:
        """Whether another connection of this address is taken at all; it counts if it is."""
        due = max(self._due.get(source, now), now)
        if due - now > self._ahead:
            return False
        if source not in self._due and len(self._due) >= SOURCES:
            self._forget(now)
        self._due[source] = due + 1 / self._rate
        return True

    def enter(self, who: T, source: str) -> T | None:
        """A connection is a stranger's from now on; the one that has to go for it, if any."""
        gone = self._one_too_many() if len(self._of) >= self._strangers else None
        self._of[who] = source
        self._by_source.setdefault(source, {})[who] = None
        return gone

    def leave(self, who: T) -> None:
        """It has ended, or is no stranger's any more."""
        source = self._of.pop(who, None)
        if source is not None:
            of_source = self._by_source[source]
            del of_source[who]
            if not of_source:
                del self._by_source[source]

    def _one_too_many(self) -> T:
        most = max(self._by_source, key=lambda source: len(self._by_source[source]))
        oldest = next(iter(self._by_source[most]))
        self.leave(oldest)
        return oldest

    def _forget(self, now: float) -> None:
        """Addresses that have kept to their rate; all, where a crowd is larger than what can be remembered."""
        self._due = {source: due for source, due in self._due.items() if due > now}
        if len(self._due) >= SOURCES:
            self._due.clear()
