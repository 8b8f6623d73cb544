"""Follows a run's event logs and keeps what the page shows ready to send; or tells the run again from a moment on.

Reading and folding happen in a worker thread, one look at a time; the event loop only ever sees finished bytes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from neurons.telemetry import Stamped
from scripts.dashboard.errors import DashboardError
from scripts.dashboard.facts import FILE, Facts, read_facts
from scripts.dashboard.snapshot import snapshot
from scripts.dashboard.state import State, sections
from scripts.dashboard.story import Story
from scripts.dashboard.yardstick import NOTHING_NAMED, Yardstick, flops_per_token
from scripts.tally import LogFollower, Tally

LOOK = 0.5
"""Seconds between two looks at the logs."""
AT_ONCE = 20_000
"""Events between two frames, about a second's work: the logs of a long run are shown as they are read."""
EVENTS = "events"


@dataclass(frozen=True, slots=True)
class Frame:
    """What the page shows, ready to send."""

    sections: dict[str, bytes]
    """JSON by name (`scripts.dashboard.state`)."""
    end: float | None
    """Time of the last event."""
    state: State | None
    """The same as values; None of nodes elsewhere."""
    problem: str = ""


def check_run(run: Path) -> None:
    """Raises `DashboardError` for a folder that is not a run's."""
    if not run.is_dir():
        raise DashboardError(f"--run {run} is no folder: give the --out folder of a run or of a node")
    if not (run / EVENTS).is_dir() and not (run / FILE).is_file():
        raise DashboardError(
            f"--run {run} has neither {EVENTS}/ nor {FILE}: give the --out folder of a run or of a node"
        )


class Teller:
    """Folds the logs of a run's folder into a story, as far as they are written, or up to a moment."""

    def __init__(self, run: Path, yardstick: Yardstick = NOTHING_NAMED) -> None:
        self._run, self._yardstick = run, yardstick
        self._folder = run.resolve().name
        self._follower = LogFollower(run / EVENTS)
        self._facts: Facts | None = None
        self._flops_per_token: int | None = None
        self._events: Iterator[tuple[str, Stamped]] | None = None
        self._ahead: tuple[str, Stamped] | None = None
        self.story = Story(Tally(0))

    def tell(self, until: float | None = None, *, most: int | None = None) -> int:
        """Fold in what has been written, up to events of the time `until` and at most so many; how many there were.

        Raises `DashboardError`, or `OSError` for a log that cannot be read just now.
        """
        if self._facts is None and (facts := read_facts(self._run)) is not None:
            self._facts, self._flops_per_token = facts, flops_per_token(facts)
            self.story.tally.tokens_per_microbatch = facts.tokens_per_microbatch
        told = 0
        while told != most and (entry := self._next()) is not None:
            if until is not None and entry[1].time > until:
                self._ahead = entry
                break
            self.story.add(*entry)
            told += 1
        return told

    def _next(self) -> tuple[str, Stamped] | None:
        """The next event, or None for now."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            return ahead
        events = self._events or self._follower.read()
        self._events = events
        try:
            entry = next(events, None)
        except ValueError as error:
            raise DashboardError(f"{self._folder}: {error}: look at it with that version") from error
        except OSError:
            self._events = None
            raise
        if entry is None:
            self._events = None
        return entry

    def frame(self, *, problem: str = "", at: float | None = None, end: float | None = None) -> Frame:
        """What the page shows now; of a replay, at the moment `at` of a run whose last event so far is at `end`."""
        state = snapshot(
            self.story,
            self._facts,
            folder=self._folder,
            yardstick=self._yardstick,
            flops_per_token=self._flops_per_token,
            torn=self._follower.torn,
            problem=problem,
            at=at,
            end=end,
        )
        return Frame(sections(state), state.run.end, state, problem)


class Feed:
    """The newest frame of a run that may still go on."""

    def __init__(self, run: Path, yardstick: Yardstick = NOTHING_NAMED) -> None:
        self._teller = Teller(run, yardstick)
        self._changed = asyncio.Event()
        self.frame = self._teller.frame()

    async def first(self) -> None:
        """Read what is there, or the beginning of much. Raises `DashboardError`."""
        try:
            told = await asyncio.to_thread(self._teller.tell, most=AT_ONCE)
        except OSError as error:
            raise DashboardError(f"{_unread(error)}: make it readable") from error
        if told:
            self.frame = await asyncio.to_thread(self._teller.frame)

    async def follow(self) -> None:
        """Look again and again, until cancelled or logs turn out to be none that can be read: the frame says so."""
        told, hopeless = 0, False
        while not hopeless:
            if told < AT_ONCE:
                await asyncio.sleep(LOOK)
            told, problem = 0, ""
            try:
                told = await asyncio.to_thread(self._teller.tell, most=AT_ONCE)
            except OSError as error:  # it may be readable again at the next look
                problem = _unread(error)
            except DashboardError as error:
                problem, hopeless = str(error), True
            if told or problem != self.frame.problem:
                self.frame = await asyncio.to_thread(self._teller.frame, problem=problem)
                self._changed.set()
                self._changed = asyncio.Event()

    async def after(self, frame: Frame) -> Frame:
        """The newest frame, as soon as it is another than this one."""
        while self.frame is frame:
            await self._changed.wait()
        return self.frame


def _unread(error: OSError) -> str:
    return f"{Path(str(error.filename)).name} cannot be read ({error.strerror})"
