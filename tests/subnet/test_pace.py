"""The closed form against hand counts, and against an event simulation of the same queues."""

from __future__ import annotations

import heapq
import random
from collections import deque
from dataclasses import replace
from itertools import count, pairwise

import pytest

from subnet.swarm.pace import PaceError, Pipeline, Replica, Routing, pace

_REPLICA = Replica(forward=0.66, backward=1.97, up=856e6, down=1322e6)
_BYTES = 2_359_296
NEVER = 10**9
"""Microbatches between two draws of lanes that stay."""


def _pipeline(stages: int = 16, replicas: int = 3, *, depth: int = 24, routing: Routing = Routing.LANES) -> Pipeline:
    return Pipeline(
        stages=((_REPLICA,) * replicas,) * stages,
        forward_bytes=_BYTES,
        backward_bytes=_BYTES,
        latency=0.03,
        depth=depth,
        routing=routing,
        lane=NEVER,
    )


class _Simulation:
    """The same queues, event by event: backward first, else first come first served; the gradient returns the way its
    input came. In the lottery a head visits every replica of a stage once in as many microbatches."""

    def __init__(self, pipeline: Pipeline, jitter: float) -> None:
        self._pipeline, self._jitter = pipeline, jitter
        self._stages, self._last = pipeline.stages, len(pipeline.stages) - 1
        self._events: list[tuple[float, int, str, int, list[int], bool]] = []
        self._ticket, self._chance, self._now = count(), random.Random(0), 0.0  # noqa: S311 - no secret
        self._orders: dict[tuple[int, int], list[int]] = {}
        self._waiting = [[(deque[list[int]](), deque[list[int]]()) for _ in stage] for stage in self._stages]
        self._busy = [[False for _ in stage] for stage in self._stages]
        size = pipeline.forward_bytes + pipeline.backward_bytes
        self._hop = [pipeline.latency + 4 * size / min(a[0].up, b[0].down) for a, b in pairwise(self._stages)]

    def rate(self, microbatches: int) -> float:
        """Counted from the first third on."""
        done: list[float] = []
        for head in range(len(self._stages[0])):
            for _ in range(self._pipeline.depth):
                self._enter(0, [head], back=False)
        while len(done) < microbatches:
            self._now, _, kind, stage, path, back = heapq.heappop(self._events)
            if kind == "arrives":
                if not back:
                    path.append(self._next(path[0], stage))
                self._enter(stage, path, back=back)
                continue
            self._busy[stage][path[stage]] = False
            if back and stage == 0:
                done.append(self._now)
                self._enter(0, path[:1], back=False)
            else:
                to = stage - 1 if back else stage + 1
                self._later(self._hop[min(stage, to)], "arrives", to, path, back)
            self._begin(stage, path[stage])
        first = microbatches // 3
        return (microbatches - 1 - first) / (done[-1] - done[first])

    def _next(self, head: int, stage: int) -> int:
        if self._pipeline.routing is Routing.LANES:
            return head
        order = self._orders.setdefault((head, stage), [])
        if not order:
            order += range(len(self._stages[stage]))
            self._chance.shuffle(order)
        return order.pop()

    def _enter(self, stage: int, path: list[int], *, back: bool) -> None:
        self._waiting[stage][path[stage]][0 if back else 1].append(path)
        self._begin(stage, path[stage])

    def _begin(self, stage: int, who: int) -> None:
        backwards, forwards = self._waiting[stage][who]
        if self._busy[stage][who] or not (backwards or forwards):
            return
        back = bool(backwards)
        path = backwards.popleft() if back else forwards.popleft()
        replica = self._stages[stage][who]
        seconds = replica.unit if stage == self._last else replica.backward if back else replica.forward
        self._busy[stage][who] = True
        seconds *= self._chance.uniform(1 - self._jitter, 1 + self._jitter)
        self._later(seconds, "done", stage, path, back or stage == self._last)

    def _later(self, seconds: float, kind: str, stage: int, path: list[int], back: bool) -> None:
        heapq.heappush(self._events, (self._now + seconds, next(self._ticket), kind, stage, path, back))


def test_a_deep_pipeline_runs_at_its_slowest_stage() -> None:
    slow = replace(_REPLICA, backward=2 * _REPLICA.backward)
    pipeline = _pipeline()
    found = pace(replace(pipeline, stages=(*pipeline.stages[:5], (slow,) * 3, *pipeline.stages[6:]), depth=60))
    assert found.capacity == pytest.approx(3 / slow.unit)
    assert found.rate == pytest.approx(found.capacity, rel=0.02)
    assert found.binding == "compute of stage 5"
    assert found.utilisation[5] == pytest.approx(1, rel=0.02)
    assert found.utilisation[0] == pytest.approx(found.utilisation[5] * _REPLICA.unit / slow.unit)


def test_replicas_of_a_stage_add_up() -> None:
    twice = replace(_REPLICA, forward=_REPLICA.forward / 2, backward=_REPLICA.backward / 2)
    pipeline = _pipeline(depth=60)
    mixed = replace(pipeline, stages=((_REPLICA, twice),) * 16)
    assert pace(mixed).capacity == pytest.approx(3 / _REPLICA.unit)


def test_the_round_trip_is_that_of_the_formula() -> None:
    found = pace(_pipeline())
    transfer = 8 * _BYTES / 856e6
    assert found.network == pytest.approx(15 * (2 * 0.03 + 2 * transfer))
    assert found.round_trip == pytest.approx(16 * _REPLICA.unit + found.network)


def test_a_shallow_pipeline_waits_for_its_round_trip() -> None:
    found = pace(_pipeline(depth=8))
    assert found.binding == "depth"
    assert found.flight > found.round_trip
    assert found.rate == pytest.approx(24 / found.flight)
    assert found.rate < found.capacity / 2


def test_a_narrow_link_binds_and_is_named() -> None:
    narrow = replace(_REPLICA, up=8 * 2 * _BYTES / 10)  # what a body sends in 10 s
    pipeline = _pipeline(depth=200)
    found = pace(replace(pipeline, stages=(*pipeline.stages[:3], (narrow,) * 3, *pipeline.stages[4:])))
    assert found.capacity == pytest.approx(3 / 10)
    assert found.rate == pytest.approx(found.capacity, rel=0.02)
    assert found.binding == "link of stage 3"


def _lateness(pipeline: Pipeline) -> float:
    """V by what came out: (1 - X/C)·w², w the seconds that a flight takes beyond an empty pipeline's."""
    found = pace(pipeline)
    return (1 - found.rate / found.capacity) * (found.flight - found.round_trip) ** 2


def test_what_is_late_waits_as_long_as_units_of_the_other_direction_last() -> None:
    met = (_REPLICA.forward**2 + _REPLICA.backward**2) / 6
    assert _lateness(_pipeline()) == pytest.approx(15 * met)
    # A tail that is half as slow as the others: a gradient comes amid a forward or a backward, with even odds.
    tail = replace(_REPLICA, forward=0.0, backward=_REPLICA.unit / 2)
    short = replace(_pipeline(), stages=(*_pipeline().stages[:-1], (tail,) * 3))
    assert _lateness(short) == pytest.approx(15 * (met + (_REPLICA.backward - _REPLICA.forward) ** 2))
    assert pace(short).rate < pace(_pipeline()).rate


def test_lanes_drawn_anew_are_late_by_chance_while_a_draw_passes_through() -> None:
    stay = _lateness(_pipeline())
    for lane, share in ((64, 16 / 64), (32, 16 / 32), (8, 1.0)):
        drawn = replace(_pipeline(), lane=lane)
        assert _lateness(drawn) - stay == pytest.approx(2 / 3 * share * 16 * _REPLICA.unit**2)
        assert pace(drawn).rate < pace(_pipeline()).rate
    alone = _pipeline(replicas=1)
    assert pace(replace(alone, lane=4)) == pace(alone)


def test_one_replica_a_stage_leaves_nothing_to_draw() -> None:
    lanes, lottery = (pace(_pipeline(replicas=1, depth=20, routing=routing)) for routing in Routing)
    assert lanes == lottery


@pytest.mark.parametrize(
    ("routing", "depth", "jitter", "within"),
    [
        (Routing.LANES, 16, 0.0, 0.05),
        (Routing.LANES, 16, 0.1, 0.12),
        (Routing.LANES, 20, 0.1, 0.03),
        (Routing.LANES, 24, 0.1, 0.02),
        (Routing.LANES, 32, 0.1, 0.03),
        (Routing.LOTTERY, 16, 0.1, 0.05),
        (Routing.LOTTERY, 24, 0.1, 0.05),
        (Routing.LOTTERY, 48, 0.1, 0.05),
    ],
)
def test_it_agrees_with_an_event_simulation(routing: Routing, depth: int, jitter: float, within: float) -> None:
    pipeline = _pipeline(depth=depth, routing=routing)
    assert pace(pipeline).rate == pytest.approx(_Simulation(pipeline, jitter).rate(900), rel=within)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"depth": 0}, "depth is 0"),
        ({"lane": 0}, "lane 0"),
        ({"latency": -1.0}, "latency -1.0"),
        ({"stages": ((_REPLICA,), ())}, "a stage has no replica"),
        ({"stages": ((_REPLICA,), (replace(_REPLICA, up=0.0),))}, "stage 1 has a link of 0 bit/s up"),
        ({"stages": ((_REPLICA,), (replace(_REPLICA, forward=0.0, backward=0.0),))}, "stage 1 takes 0.0 s"),
    ],
)
def test_what_is_no_pipeline_is_refused(change: dict[str, object], words: str) -> None:
    with pytest.raises(PaceError, match=words):
        replace(_pipeline(), **change)  # type: ignore[arg-type]
