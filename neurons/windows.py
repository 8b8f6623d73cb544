"""Windows of one round at one replica: from step to step, each closed by its head.

The compute thread copies the weights and moments between two steps; hashing them takes longer than the copy and happens
beside training, in the order of the windows. All leaves of a window are in the ledger when it is closed, because units
come back from the compute thread in the order in which they were computed.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from model.engine import StageEngine, StepReport
from model.stage import flatten
from neurons.archive import RoundArchive
from neurons.kept import State, Vector
from subnet.transport.synapse import tensor_bytes
from subnet.trust.heads import WindowHead
from subnet.trust.ledger import Direction, Leaf, Ledger, units_hash
from subnet.trust.tree import Tree

Change = Callable[[torch.Tensor], torch.Tensor]
"""From a replica's weights to others (flat fp32), as a merge wants them."""


def root_of(flat: torch.Tensor) -> bytes:
    """What evidence names a flat fp32 vector by (32 bytes)."""
    return Tree.of(tensor_bytes(flat)).root


@dataclass(frozen=True, slots=True)
class Opened:
    """How a window begins."""

    version: int
    steps: int
    """Optimizer steps done before it."""
    merged: int
    """Rounds merged into the public state taken over just before it; 0 where none was."""
    state: State

    @classmethod
    def of(cls, engine: StageEngine, state: State, *, merged: int = 0) -> Opened:
        return cls(engine.version, engine.steps, merged, state)


@dataclass(frozen=True, slots=True)
class Stepped:
    """What a step leaves: its report, how many units it took, the state after it, and the window it opens."""

    report: StepReport
    units: int
    after: State
    opened: Opened


@dataclass(frozen=True, slots=True)
class Closed:
    """A window with all its units."""

    opened: Opened
    after: State
    leaves: tuple[Leaf, ...]
    slot: int

    def head(self) -> WindowHead:
        """Hashes its states."""
        begin, end = self.opened.state, self.after
        forward = sum(leaf.direction is Direction.FORWARD for leaf in self.leaves)
        return WindowHead(
            version=self.opened.version,
            steps=self.opened.steps,
            slot=self.slot,
            forward=forward,
            backward=len(self.leaves) - forward,
            merged=self.opened.merged,
            weights=begin.weights.tree().root,
            optimizer=begin.moments.tree().root,
            units=units_hash(self.leaves),
            next_weights=end.weights.tree().root,
            next_optimizer=end.moments.tree().root,
        )


class Witness(Protocol):
    """Who is told of windows as they close."""

    def slot(self) -> int:
        """The slot that a window which closes now belongs to."""

    def entered(self, head: WindowHead) -> None:
        """A head is in the ledger."""


class Unwitnessed:
    """Nobody is told: everything lies in the first slot."""

    def slot(self) -> int:
        return 0

    def entered(self, head: WindowHead) -> None:
        pass


UNWITNESSED = Unwitnessed()


class Changes:
    """What merges have left to be taken over at the next step boundary, oldest first."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[Change, int, asyncio.Future[None]]] = deque()

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def add(self, change: Change, held: int) -> asyncio.Future[None]:
        """`held` rounds are merged into the state that `change` leads to. Done once it has been taken over."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((change, held, done))
        return done

    def take_over(self, engine: StageEngine, state: State | None) -> Opened:
        """On the compute thread, between two steps: change the weights; the window that begins then.

        `state` is what the engine has now, if that has been copied.
        """
        merged, moments = 0, Vector(engine.moments()) if state is None else state.moments
        for change, held, done in tuple(self._waiting):
            engine.replace_weights(change(flatten(engine.stage)))
            self._waiting.popleft()
            merged, state = held, None
            done.get_loop().call_soon_threadsafe(_answer, done)
        return Opened.of(engine, state or State(Vector(flatten(engine.stage)), moments), merged=merged)


def _answer(done: asyncio.Future[None]) -> None:
    if not done.done():
        done.set_result(None)


class Windows:
    """The windows of one round. Heads go into the ledger as they are hashed."""

    def __init__(self, ledger: Ledger, archive: RoundArchive, first: Opened, witness: Witness) -> None:
        self._ledger = ledger
        self._witness = witness
        self._archive = archive
        self._current = first
        self._hashing: asyncio.Task[None] | None = None
        self._begin(first, first.state)

    def stepped(self, step: Stepped) -> None:
        """A step closes the window and opens the next; after one without a finite gradient it ends as it began."""
        after = step.after if step.report.finite else self._current.state
        self._close(after)
        self._begin(step.opened, after)

    def changed(self, opened: Opened) -> None:
        """Other weights without a step: a window that has units already ends with what it began with."""
        if opened.version != self._current.version:
            self._close(self._current.state)
        self._begin(opened, self._current.state)

    async def finish(self) -> bytes:
        """Close what is open and wait until every head is in the ledger; the root of the weights now."""
        self._close(self._current.state)
        if self._hashing is not None:
            await self._hashing
        closing = self._current.state.weights
        self._archive.end(closing)
        return (await asyncio.to_thread(closing.tree)).root

    def _begin(self, opened: Opened, before: State) -> None:
        self._current = opened
        self._archive.open_window(opened.version, opened.state, before.weights if opened.merged else None)

    def _close(self, after: State) -> None:
        leaves = self._ledger.window(self._current.version)
        if leaves:
            closed = Closed(self._current, after, leaves, self._witness.slot())
            self._archive.close_window(closed.slot, after)
            self._hashing = asyncio.create_task(self._enter(self._hashing, closed))

    async def _enter(self, before: asyncio.Task[None] | None, closed: Closed) -> None:
        if before is not None:
            await before
        head = await asyncio.to_thread(closed.head)
        self._ledger.close_window(head)
        self._archive.enter(head)
        self._witness.entered(head)
