"""How long a microbatch that leaves a head now will take, judged by those that are back and those that are not.

A pipeline that is full gives back one microbatch per interval, so one that leaves waits for all that are in the air
before it (Little's law: time = number in flight x interval). One that is not full takes as long as it takes to cross.
So a flight says how long another will take that leaves with as many in the air, and with half as many half of that,
but not less than the quickest took: towards a round's end fewer and fewer are kept in the air instead of none at all.
What is in the air longer than any that came back tells more than those. Pure: times are handed in, seconds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass

RECENT = 8
"""Flights whose slowest counts."""
DRAIN_MARGIN = 1.5
"""A microbatch is started only if this many times as long as it is expected to take fits before the round closes."""
DRAIN_SLACK = 0.25
"""And this part of a mean flight of the round besides: the last ones are short, what may come between them is not."""


@dataclass(frozen=True, slots=True)
class Flight:
    """A microbatch that left."""

    time: float
    load: int
    """In the air then, itself included."""

    def scaled(self, seconds: float, load: int) -> float:
        """How long one takes that leaves with `load` in the air, if this one took so many seconds and had to queue."""
        return seconds * min(1.0, load / self.load)


class Flights:
    """Of one head, over its rounds."""

    def __init__(self) -> None:
        self._recent: deque[tuple[float, Flight]] = deque(maxlen=RECENT)
        self._load = 1.0
        self._left: float | None = None
        self._landed = 0
        self._flown = 0.0

    @property
    def load(self) -> float:
        """Heads per replica at this round's stage that has fewest."""
        return self._load

    @property
    def slowest(self) -> float:
        """Of the last flights; 0 before the first."""
        return max((seconds for seconds, _ in self._recent), default=0.0)

    @property
    def measured(self) -> bool:
        """Whether a flight of this round is back."""
        return self._landed > 0

    def begin(self, load: float) -> None:
        """A round begins; `load` is the number of heads per replica at the stage that has fewest. Where a replica
        gets more to do than in the round before, flights take so many times longer until one is back."""
        if load > self._load:
            grown = load / self._load
            self._recent = deque(((seconds * grown, left) for seconds, left in self._recent), maxlen=RECENT)
        self._load, self._left, self._landed, self._flown = load, None, 0, 0.0

    def leave(self, now: float, in_air: int) -> Flight:
        """A microbatch leaves after `in_air` others that are not back."""
        if self._left is None:
            self._left = now
        return Flight(now, in_air + 1)

    def land(self, seconds: float, left: Flight) -> None:
        """One is back after so long. The first of a round tells more than all before it."""
        if not self._landed:
            self._recent.clear()
        self._landed += 1
        self._flown += seconds
        self._recent.append((seconds, left))

    def expected(self, now: float, in_air: Collection[Flight]) -> float:
        """Seconds until one that leaves now is back; `in_air` are those that are not."""
        load, slowest = len(in_air) + 1, self.slowest
        quickest = min((seconds for seconds, _ in self._recent), default=0.0)
        back = (left.scaled(seconds, load) for seconds, left in self._recent)
        away = (now - left.time if now - left.time > slowest else left.scaled(now - left.time, load) for left in in_air)
        queued = 0.0
        if self._landed and self._left is not None:
            queued = load * (now - self._left) / self._landed
        return max(quickest, queued, *back, *away)

    def returns(self, now: float, in_air: Collection[Flight], *, closing_at: float, probe_until: float) -> bool:
        """Whether one that leaves now will be back before the round closes, with some margin.

        A slow round before must not keep a head out of this one: who starts nothing measures nothing better. So as long
        as nothing of this round is back, one may leave until `probe_until` whatever is expected of it.
        """
        slack = DRAIN_SLACK * self._flown / max(1, self._landed)
        if now + DRAIN_MARGIN * self.expected(now, in_air) + slack <= closing_at:
            return True
        return not in_air and not self.measured and now <= probe_until
