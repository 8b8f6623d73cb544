"""Series that stay short however long a run is: when one is full, neighbours are put together two by two."""

from __future__ import annotations

from dataclasses import dataclass, field

POINTS = 600
"""More than a plot has pixels to tell apart, less than what is slow to send twice a second."""
BINS = 240
FIRST_BIN = 5.0
"""Seconds: shorter ones hold too few microbatches to say a rate."""


@dataclass(slots=True)
class Point:
    """Neighbouring microbatches as one."""

    time: float
    """When the last of them came back, seconds since the epoch."""
    done: int
    """Microbatches of the whole run that were back by then."""
    sum: float
    """Of their losses, nats per token."""
    count: int

    @property
    def loss(self) -> float:
        return self.sum / self.count


@dataclass
class Curve:
    """Training loss: at most `limit` points, each the mean of `width` microbatches (the last of fewer)."""

    limit: int = POINTS
    width: int = 1
    points: list[Point] = field(default_factory=list)

    def add(self, time: float, done: int, loss: float) -> None:
        """One microbatch, the `done`-th of the run. A time before the last one's counts as that: clocks differ."""
        last = self.points[-1] if self.points else None
        if last is not None and last.count < self.width:
            self.points[-1] = _joined(last, Point(max(time, last.time), done, loss, 1))
        else:
            self.points.append(Point(time if last is None else max(time, last.time), done, loss, 1))
        if len(self.points) > self.limit:
            odd = self.points[len(self.points) // 2 * 2 :]
            pairs = zip(self.points[::2], self.points[1::2], strict=False)
            self.points = [_joined(a, b) for a, b in pairs] + odd
            self.width *= 2


def _joined(a: Point, b: Point) -> Point:
    return Point(b.time, b.done, a.sum + b.sum, a.count + b.count)


@dataclass
class Rate:
    """Microbatches per stretch of time: at most `limit` bins of `seconds` each, from `begin` on."""

    limit: int = BINS
    seconds: float = FIRST_BIN
    begin: float | None = None
    counts: list[int] = field(default_factory=list)

    def add(self, time: float) -> None:
        """One microbatch came back at `time`, seconds since the epoch."""
        if self.begin is None:
            self.begin = time
        while time - self.begin >= self.seconds * self.limit:
            if len(self.counts) % 2:
                self.counts.append(0)
            self.counts = [a + b for a, b in zip(self.counts[::2], self.counts[1::2], strict=True)]
            self.seconds *= 2
        index = max(0, int((time - self.begin) / self.seconds))
        self.counts.extend([0] * (index + 1 - len(self.counts)))
        self.counts[index] += 1

    def whole(self, now: float) -> list[tuple[float, float]]:
        """(end of the bin, microbatches per second) of those that were over by `now`."""
        if self.begin is None:
            return []
        ends = [self.begin + (index + 1) * self.seconds for index in range(len(self.counts))]
        return [(end, count / self.seconds) for end, count in zip(ends, self.counts, strict=True) if end <= now]
