"""How far something long is, how fast it goes and how long it still takes.

`Pace` only reckons, from moments handed in. `followed` is the edge: while something goes on that counts into a `Meter`
it tells now and then how far that is, by the loop's time, so that one that hangs is seen to hang.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from subnet.quantities import duration, size

EVERY = 10.0
"""Seconds between two lines."""
WINDOW = 60.0
"""Seconds over which a rate is taken: long enough to be even, short enough that a stall shows."""


@dataclass(frozen=True, slots=True)
class Standing:
    """How far something is."""

    done: float
    total: float
    here: float
    """Of `done`, what was there before it began."""
    seconds: float
    """Since then."""
    rate: float | None
    """Per second, of late; None while there is nothing to tell it from."""

    @property
    def share(self) -> float:
        return self.done / self.total if self.total else 1.0

    @property
    def left(self) -> float | None:
        """Seconds still to go at this rate; None where nothing moves."""
        return (self.total - self.done) / self.rate if self.rate else None

    def text(self, unit: Callable[[float], str] = size) -> str:
        """For a person; `unit` writes amounts."""
        if self.done >= self.total:
            mean = (
                f", {unit((self.done - self.here) / self.seconds)}/s" if self.seconds and self.done > self.here else ""
            )
            return f"{unit(self.total)} in {duration(self.seconds)}{mean}"
        rate = "" if self.rate is None else f", {unit(self.rate)}/s"
        left = "" if self.left is None else f", {duration(self.left)} left"
        return f"{self.share:.1%} of {unit(self.total)}{rate}{left}"


class Pace:
    """Reckons rates. What was there at first says nothing about them."""

    def __init__(self, now: float, here: float = 0.0, *, window: float = WINDOW) -> None:
        """`now` in seconds of any clock. `window` of infinity takes the mean over all."""
        self._began, self._here, self._window = now, here, window
        self._marks = deque([(now, here)])

    def at(self, now: float, done: float, total: float) -> Standing:
        """Times must not fall from call to call."""
        if math.isfinite(self._window):
            self._marks.append((now, done))
            while self._marks[1][0] <= now - self._window:
                self._marks.popleft()
        since, before = self._marks[0]
        rate = (done - before) / (now - since) if now > since else None
        return Standing(done=done, total=total, here=self._here, seconds=now - self._began, rate=rate)


@dataclass
class Meter:
    """What something long counts into, from whichever thread. Nothing is told of it before it has a total."""

    done: float = 0.0
    total: float = 0.0
    here: float = 0.0
    """Of `done`, what was there before it began."""

    def at(self, done: float, total: float) -> None:
        """So much of so much; what is said first was there before."""
        if not self.total:
            self.here = done
        self.done, self.total = done, total


@asynccontextmanager
async def followed(meter: Meter, tell: Callable[[Standing], None], *, every: float = EVERY) -> AsyncIterator[None]:
    """Tell `every` so many seconds how far what goes on within is, and once more at its end, unless it failed."""
    clock = asyncio.get_running_loop().time
    began = clock()
    pace: Pace | None = None

    def now() -> None:
        nonlocal pace
        if meter.total:
            pace = pace or Pace(began, meter.here)
            tell(pace.at(clock(), meter.done, meter.total))

    async def ticking() -> None:
        while True:
            await asyncio.sleep(every)
            now()

    ticks = asyncio.create_task(ticking())
    try:
        yield
    finally:
        ticks.cancel()
        await asyncio.gather(ticks, return_exceptions=True)
    now()
