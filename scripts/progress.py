"""How far a command is: one live line on a terminal, a line now and then elsewhere. On stderr, results go to stdout."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from neurons.progress import Pace
from subnet.quantities import size

EVERY = 5.0
"""Seconds between two lines."""


class ProgressView:
    """Shows how far something is, as it is told. A context manager."""

    def __init__(
        self,
        console: Console,
        *,
        plain: bool = False,
        unit: Callable[[float], str] = size,
        every: float = EVERY,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """`unit` writes amounts, `plain` wants lines on a terminal too."""
        self._console, self._unit, self._every, self._now = console, unit, every, now
        self._pace: Pace | None = None
        self._said = 0.0
        live = console.is_terminal and not plain
        self._bar = Progress(BarColumn(), TextColumn("{task.description}"), console=console) if live else None
        self._task = None if self._bar is None else self._bar.add_task("", total=None)

    def __enter__(self) -> ProgressView:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, done: float, total: float, note: str = "") -> None:
        """So much of so much. What is told first was there before: it says nothing about the rate."""
        now = self._now()
        if self._pace is None:
            self._pace, self._said = Pace(now, done, window=math.inf), now
            if done:
                self._console.print(f"going on after {self._unit(done)} of {self._unit(total)}", highlight=False)
        standing = self._pace.at(now, done, total)
        words = "  ".join(part for part in (standing.text(self._unit), note) if part)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, total=total, description=words)
        elif now - self._said >= self._every or (done >= total and standing.seconds >= self._every):
            self._said = now
            self._console.print(f"{standing.seconds:8.1f} s  {words}", highlight=False)
