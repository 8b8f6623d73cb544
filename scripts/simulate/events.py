"""The virtual clock: calls in the order of their times, and of their making where times are equal."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import TypeVarTuple

Args = TypeVarTuple("Args")


class Clock:
    """Time in seconds from 0."""

    __slots__ = ("_heap", "_made", "now")

    def __init__(self) -> None:
        self.now = 0.0
        self._made = 0
        self._heap: list[tuple[float, int, Callable[..., None], tuple[object, ...]]] = []

    def at(self, time: float, call: Callable[[*Args], None], *args: *Args) -> None:
        """Call it at `time`, which must not be past."""
        self._made += 1
        heapq.heappush(self._heap, (time, self._made, call, args))

    def run(self, until: float) -> None:
        """Everything up to `until`, at which the clock then stands."""
        heap, pop = self._heap, heapq.heappop
        while heap and heap[0][0] <= until:
            self.now, _, call, args = pop(heap)
            call(*args)
        self.now = until

    @property
    def calls(self) -> int:
        """Made so far."""
        return self._made
