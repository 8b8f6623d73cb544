"""Compute on a virtual clock: the real engine's arithmetic, done at once, that takes as long as a device would.

A job runs when the compute thread would take it, with the clock ahead by what it took so far; its answer is there when
the clock has come to where the job left it.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, cast

from torch import Tensor

from model.engine import StageEngine, StepReport
from neurons.compute import ComputeThread, Job, Lane
from neurons.pipeline import StageWorker
from neurons.rounds import RoundMachine, build_worker
from subnet.swarm.merge import Merged
from subnet.swarm.roster import Roster
from subnet.trust.ledger import Evidence


class Ahead(Protocol):
    """A loop whose clock can be ahead."""

    ahead: float


class VirtualCompute(ComputeThread):
    """`ComputeThread`, without a thread."""

    def __init__(self, **_names: object) -> None:
        self._virtual = asyncio.get_running_loop()
        self._queues: dict[Lane, list[Job]] = {lane: [] for lane in Lane}
        self._busy = self._stopped = False
        self.busy_seconds = 0.0

    def submit(self, lane: Lane, index: int, call: Callable[[], Any]) -> asyncio.Future[Any]:
        answer: asyncio.Future[Any] = self._virtual.create_future()
        heapq.heappush(self._queues[lane], Job(index, call, answer))
        if not self._busy:
            self._busy = True
            self._virtual.call_soon(self._run_next)
        return answer

    def _run_next(self) -> None:
        queue = next((queue for queue in self._queues.values() if queue), None)
        if queue is None or self._stopped:
            self._busy = False
            return
        clock = cast("Ahead", self._virtual)
        deliver = heapq.heappop(queue).run()
        took, clock.ahead = clock.ahead, 0.0
        self.busy_seconds += took
        self._virtual.call_later(took, self._end, deliver)

    def _end(self, deliver: Callable[[], None]) -> None:
        if not self._stopped:
            deliver()
            self._run_next()

    def clear(self) -> None:
        for queue in self._queues.values():
            for job in queue:
                job.cancel()
            queue.clear()

    async def idle(self) -> None:
        while self._busy:  # noqa: ASYNC110 - on a virtual clock
            await asyncio.sleep(0.01)

    def stop(self) -> None:
        self.clear()
        self._stopped = True


@dataclass(slots=True)
class Pace:
    """What a unit takes on one node, and what became of those that it computed."""

    forward: float
    backward: float
    step: float
    times: float = 1.0
    """Slower than that by this factor, for now."""
    accumulated: list[Hashable] = field(default_factory=list)
    """Units whose gradients the next step applies."""
    applied: list[Hashable] = field(default_factory=list)
    """Those that steps have applied since the last cut."""
    cuts: list[tuple[int, int, tuple[Hashable, ...]]] = field(default_factory=list)
    """Round, stage, and the units in the contribution to its merge."""

    def take(self, seconds: float) -> None:
        cast("Ahead", asyncio.get_running_loop()).ahead += seconds * self.times


class PacedEngine(StageEngine):
    """The engine, at a pace."""

    def __init__(self, *args: Any, pace: Pace, **options: Any) -> None:  # noqa: ANN401 - as an engine is made
        super().__init__(*args, **options)
        self._pace = pace
        pace.accumulated.clear()
        pace.applied.clear()

    def forward(self, key: Hashable, x: Tensor, tokens: Tensor | None = None) -> Tensor:
        out = super().forward(key, x, tokens)
        self._pace.take(self._pace.forward)
        return out

    def backward(self, key: Hashable, g: Tensor) -> Tensor | None:
        out = super().backward(key, g)
        self._pace.take(self._pace.backward)
        self._pace.accumulated.append(key)
        return out

    def tail(self, key: Hashable, x: Tensor, targets: Tensor, tokens: Tensor | None = None) -> Any:  # noqa: ANN401
        out = super().tail(key, x, targets, tokens)
        self._pace.take(self._pace.forward + self._pace.backward)
        self._pace.accumulated.append(key)
        return out

    def step(self) -> StepReport:
        report = super().step()
        self._pace.take(self._pace.step)
        self._pace.applied += self._pace.accumulated
        self._pace.accumulated.clear()
        return report

    def discard_gradients(self) -> None:
        super().discard_gradients()
        self._pace.accumulated.clear()


def machine_at(pace: Pace) -> type[RoundMachine]:
    """The round machine of a miner that computes at this pace."""

    class Paced(RoundMachine):
        def _build(self) -> StageWorker:
            engine, worker = partial(PacedEngine, pace=pace), partial(StageWorker, compute=VirtualCompute)
            return build_worker(self._node, self.stage, engine=engine, worker=worker)

        def adopt(self, public: Merged, held: int) -> None:
            pace.applied.clear()  # they were in the weights that go
            super().adopt(public, held)

        async def _cut(self, roster: Roster, evidence: Evidence) -> None:
            pace.cuts.append((roster.round, self.stage, tuple(pace.applied)))
            pace.applied.clear()
            await super()._cut(roster, evidence)

    return Paced
