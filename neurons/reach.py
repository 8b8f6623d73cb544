"""Who can be reached: what a replica knows of its neighbours from how its calls ended and from theirs.

Who could not be reached is *down*: asked last, and what it has is offered to its siblings. It is down until it gives a
sign of life, an answer or a call of its own, or until so much time has passed that it deserves another try. A call of
its own counts only if it cannot have been made while ours failed: one that speaks and does not answer stays down.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

DOWN_SECONDS = 5.0
"""A replica that could not be reached is asked last for so long, unless there is a sign of it."""


@dataclass(slots=True)
class _Neighbour:
    """One replica; times are the loop's."""

    down_until: float = -math.inf
    aside_until: float = -math.inf
    heard: float = -math.inf
    deaf: bool = False
    """It spoke while the call that failed last was made."""


class Reach:
    """Of one replica's neighbours. Pure: times are handed in, seconds."""

    def __init__(self) -> None:
        self._neighbours: dict[str, _Neighbour] = {}

    def failed(self, hop: str, *, since: float, now: float) -> None:
        """A call that began at `since` did not reach it."""
        found = self._of(hop)
        found.down_until = now + DOWN_SECONDS
        found.deaf = found.heard >= since

    def answered(self, hop: str) -> None:
        """It has answered a call, whatever it said."""
        found = self._neighbours.get(hop)
        if found is not None:
            found.down_until = -math.inf

    def heard(self, hop: str, *, now: float) -> None:
        """It has called."""
        found = self._of(hop)
        found.heard = now
        if not found.deaf:
            found.down_until = -math.inf

    def set_aside(self, hop: str, *, now: float) -> None:
        """Take it for one that is down, whatever signs it gives, for a while."""
        self._of(hop).aside_until = now + DOWN_SECONDS

    def is_down(self, hop: str, *, now: float) -> bool:
        found = self._neighbours.get(hop)
        return found is not None and now < max(found.down_until, found.aside_until)

    def missing(self, *, now: float) -> list[str]:
        """Who is down and may be back any moment."""
        return [hop for hop, found in self._neighbours.items() if now < found.down_until]

    def _of(self, hop: str) -> _Neighbour:
        return self._neighbours.setdefault(hop, _Neighbour())
