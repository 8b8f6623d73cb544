"""How activations find replicas that have room, against queues on paper: none is lost, none placed twice, and who said
to be full is left alone for as long as it said."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import cast

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from neurons.delivery import Delivery
from neurons.reach import Reach
from neurons.training import TrainingRound
from subnet.messages import Forward
from subnet.swarm.roster import Roster
from subnet.swarm.routing import hops
from subnet.transport.errors import Full, Unreachable
from subnet.trust.ledger import Leaf
from tests.virtual import VirtualLoop

REPLICAS = ("a", "b", "c")
HEAD = "head"
ROOM = 2
"""Units that a replica takes before it is full."""
PAUSE = 0.4
"""Seconds after which one that is full may be asked again."""
TAKES = 0.01
"""Seconds of an offer."""
LANE = 4


class Sender(Delivery):
    """Its rules as they are, with offers to `Stage` in place of calls."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._plan = SimpleNamespace(index=0)  # type: ignore[assignment]
        self._lane = LANE
        self._reach = Reach()
        self._full: dict[str, float] = {}
        self._line = asyncio.Lock()

    async def _push(self, _current: TrainingRound, hop: str, push: Forward, *_rest: object) -> bytes:  # type: ignore[override]
        start = asyncio.get_running_loop().time()
        await asyncio.sleep(TAKES)
        try:
            return self._stage.offered(hop, push.sample, asked=start, now=asyncio.get_running_loop().time())
        except Unreachable:
            self._miss(hop, since=start)
            raise


class Stage(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        self.loop = VirtualLoop()
        self.queues: dict[str, list[int]] = {replica: [] for replica in REPLICAS}
        self.down: set[str] = set()
        self.placed: dict[int, str] = {}
        self.refused: dict[str, float] = {}
        """When each replica said last that it is full for `PAUSE` seconds."""
        self.wrong: list[str] = []
        self.excused: dict[int, set[str]] = {}
        """Replicas that were down or full while a sample looked for one."""
        self.tasks: dict[int, asyncio.Task[None]] = {}
        roster = Roster.of([[HEAD], REPLICAS])
        self.current = cast(
            "TrainingRound",
            SimpleNamespace(
                roster=roster, seed=b"seed", accepting=True, open={}, awaited={}, sinks={}, rerouted=0, number=0,
                ledger=SimpleNamespace(receipt=lambda *_args, **_more: None),
            ),
        )  # fmt: skip
        self.sender = self.within(self._made())

    async def _made(self) -> Sender:
        return Sender(self)

    def within(self, work):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201 - as run_until_complete
        return self.loop.run_until_complete(work)

    def offered(self, hop: str, sample: int, *, asked: float, now: float) -> bytes:
        """What the replica says. Raises as a push does."""
        since = asked - self.refused.get(hop, -PAUSE)
        if 1e-9 < since < PAUSE - 1e-9:
            self.wrong.append(f"{hop} was asked {since:.3f} s after it had said to be full")
        if sample in self.placed:
            self.wrong.append(f"sample {sample} is at {self.placed[sample]} already, and {hop} is asked")
        if hop in self.down:
            raise Unreachable(f"{hop} is gone")
        if len(self.queues[hop]) >= ROOM:
            self.refused[hop] = now
            self.excuse(hop)
            raise Full(f"{hop} is full", "ask again", retry_after=PAUSE)
        self.queues[hop].append(sample)
        self.placed[sample] = hop
        return bytes(64)

    def excuse(self, hop: str) -> None:
        for excused in self.excused.values():
            excused.add(hop)

    @rule()
    def start(self) -> None:
        sample = len(self.tasks)
        now = self.loop.time()
        self.excused[sample] = {*self.down, *(hop for hop, at in self.refused.items() if now < at + PAUSE)}
        self.excused[sample] |= {hop for hop in REPLICAS if self.sender._reach.is_down(hop, now=now)}
        self.current.open[sample] = SimpleNamespace()  # type: ignore[assignment]
        push = SimpleNamespace(sample=sample, index=sample, head=HEAD, again=False)
        work = self.sender.forward(
            self.current, cast("Forward", push), cast("Leaf", SimpleNamespace(key=sample)), torch.zeros(1)
        )
        self.tasks[sample] = self.loop.create_task(work)

    @rule(seconds=st.floats(0.0, 2.0))
    def wait(self, seconds: float) -> None:
        self.within(asyncio.sleep(seconds))

    @rule(hop=st.sampled_from(REPLICAS))
    def compute(self, hop: str) -> None:
        if hop not in self.down and self.queues[hop]:
            self.current.open.pop(self.queues[hop].pop(0))

    @precondition(lambda self: len(self.down) < len(REPLICAS) - 1)
    @rule(hop=st.sampled_from(REPLICAS))
    def fail(self, hop: str) -> None:
        self.down.add(hop)
        self.excuse(hop)

    @rule(hop=st.sampled_from(REPLICAS))
    def come_back(self, hop: str) -> None:
        self.down.discard(hop)

    @invariant()
    def queues_are_bounded(self) -> None:
        if hasattr(self, "queues"):
            assert all(len(queue) <= ROOM for queue in self.queues.values())
            assert not self.wrong

    @invariant()
    def the_plan_is_kept_where_it_can_be(self) -> None:
        for sample, hop in getattr(self, "placed", {}).items():
            order = hops(REPLICAS, seed=b"seed", stage=1, head=0, heads=1, index=sample, lane=LANE)
            assert hop == order[0] or order[0] in self.excused[sample], (sample, hop, order)

    def teardown(self) -> None:
        """Once all are there and compute, everything finds a place."""
        if not hasattr(self, "loop"):
            return
        self.down.clear()
        for _ in range(len(self.tasks) + 40):
            for hop in REPLICAS:
                self.compute(hop)
            self.within(asyncio.sleep(PAUSE + TAKES))
        assert self.placed.keys() == self.tasks.keys()
        assert all(task.done() and task.exception() is None for task in self.tasks.values())
        self.loop.close()


TestRouting = Stage.TestCase
TestRouting.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
