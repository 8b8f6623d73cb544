"""How a swarm got over the loss of a node: what was in flight then, and when it was back."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Recovery:
    """From the moment `begin` (seconds since the epoch) at which `node` was killed or frozen."""

    node: str
    round: int
    begin: float
    in_flight: int
    waiting: set[tuple[int, int]]
    """(round, sample) in flight at `begin` and not back yet."""
    first: float | None = None
    """Seconds until the first of those was back."""
    last: float | None = None
    """Seconds until the last of those that came back was back."""
    longest_gap: float = 0.0
    """Longest time up to `last` without any microbatch coming back, seconds."""
    _previous: float | None = None
    _gap: float = 0.0

    def done(self, key: tuple[int, int], time: float) -> None:
        """A microbatch came back at `time`."""
        if not self.waiting:
            return
        self._gap = max(self._gap, time - (self.begin if self._previous is None else self._previous))
        self._previous = time
        if key not in self.waiting:
            return
        self.waiting.discard(key)
        self.last = time - self.begin
        self.first = self.last if self.first is None else self.first
        self.longest_gap = self._gap
