"""How far a preparation is: a bar on a terminal, a line now and then elsewhere. On stderr, results go to stdout."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from model.corpora.prepare import Advance

EVERY = 5.0
"""Seconds between two lines."""


class PrepareView:
    """Shows advances as they come."""

    def __init__(self, console: Console, *, plain: bool, now: Callable[[], float] = time.monotonic) -> None:
        self._console, self._now = console, now
        self._first: tuple[float, Advance] | None = None
        self._said = 0.0
        self._bar = None if plain or not console.is_terminal else _bar(console)
        self._task = None if self._bar is None else self._bar.add_task("", total=None, note="")

    def __enter__(self) -> PrepareView:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, advance: Advance) -> None:
        now = self._now()
        if self._first is None:  # what an earlier run has read says nothing about the rate of this one
            self._first, self._said = (now, advance), now
            if advance.read:
                self._console.print(f"going on after {size(advance.read)} of {size(advance.total)}", highlight=False)
        if self._bar is not None and self._task is not None:
            note = f"{advance.documents:,} documents  {advance.tokens:,} tokens"
            self._bar.update(self._task, completed=advance.read, total=advance.total, note=note)
        elif now - self._said >= EVERY:
            self._said = now
            self._console.print(self._line(advance, now), highlight=False)

    def _line(self, advance: Advance, now: float) -> str:
        assert self._first is not None  # noqa: S101 - show has set it
        began, first = self._first
        rate = (advance.read - first.read) / (now - began)
        left = f"{(advance.total - advance.read) / rate:,.0f} s left" if rate else "rate unknown"
        return (
            f"{now - began:8.1f} s  {advance.read / advance.total:6.1%} of {size(advance.total)}  {size(rate)}/s  "
            f"{left}  {advance.documents:,} documents  {advance.tokens:,} tokens"
        )


def size(count: float) -> str:
    """Bytes in units of 1,000."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1_000 or unit == "TB":
            break
        count /= 1_000
    return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"


def _bar(console: Console) -> Progress:
    return Progress(
        BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
        console=console,
    )  # fmt: skip
