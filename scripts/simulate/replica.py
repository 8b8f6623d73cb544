"""One replica in a simulation: what it holds, what it waits for, and what its thread does next.

Everything it decides by is what a node decides by: the same rules, fed with the same measured times.
"""

from __future__ import annotations

import heapq
from collections import deque
from enum import IntEnum

from neurons.compute import Lane
from neurons.delivery import RECENT_RETURNS, RecentMean, overdue_after
from neurons.drive import in_flight, longest_flight
from neurons.flights import Flight, Flights
from neurons.reach import Reach
from scripts.simulate.network import Port
from subnet.swarm import pace
from subnet.swarm.routing import room


class Job(IntEnum):
    """What a compute thread does in one go."""

    FORWARD = 0
    BACKWARD = 1
    ADOPTED = 2
    """A forward and its backward in place of a sibling that is gone."""
    TAIL = 3
    """A forward, the loss and the backward at once, at the last stage."""


class Microbatch:
    """One unit of pipelined work, on its way through the stages and back."""

    __slots__ = ("done", "head", "index", "round", "sample")

    def __init__(self, head: Replica, number: int, index: int, sample: int) -> None:
        self.head = head
        """Whose it is; another may have taken it over."""
        self.round = number
        self.index = index
        self.sample = sample
        self.done = False


class Replica:
    """One node with one stage."""

    def __init__(self, name: str, *, stage: int, place: int, count: int, speed: pace.Replica) -> None:
        self.name = name
        self.stage = stage
        self.place = place
        self.count = count
        """Stages."""
        self.alive = True
        self.port = Port(up=speed.up, down=speed.down)
        self.durations = {
            Job.FORWARD: speed.forward,
            Job.BACKWARD: speed.backward,
            Job.ADOPTED: speed.unit,
            Job.TAIL: speed.unit,
        }
        self.push_seconds = RecentMean()
        self.unit_seconds = RecentMean()
        """F + B of a unit."""
        self.flights = Flights()
        self._returns: deque[float] = deque(maxlen=RECENT_RETURNS)
        self._reach = Reach()
        self.knows_down = False
        """Whether anybody could not be reached so far."""
        self.unmerged = 0
        """Backward units since its last cut: what dies with it."""
        self.begin()

    def begin(self) -> None:
        """A round begins: nothing of the last one is left."""
        self._lanes: dict[Lane, list[tuple[int, int, Job, Microbatch]]] = {lane: [] for lane in Lane}
        self._queued = 0
        self.running: tuple[Job, float] | None = None
        """What the thread does, and since when."""
        self.units = 0
        """Of this round, begun."""
        self.work = 0
        """Units accepted and not computed."""
        self.open: dict[Microbatch, Replica | None] = {}
        """Inputs whose gradient is awaited, and where each came from; None at a head."""
        self.computed: set[Microbatch] = set()
        """Whose forward ran here."""
        self.forwarded: set[Microbatch] = set()
        """Accepted as activations."""
        self.returned: set[Microbatch] = set()
        """Accepted as gradients."""
        self.gradients: dict[Microbatch, Replica] = {}
        """Whose input gradient is here, and who sent the input."""
        self.delivering: set[Microbatch] = set()
        """Gradients on their way."""
        self.adopting: set[Microbatch] = set()
        """Whose input is being fetched in a dead sibling's place."""
        self.awaited: dict[Microbatch, tuple[Replica, float, float]] = {}
        """Delivered outputs: to whom, since when, and when first."""
        self.first: dict[Microbatch, float] = {}
        """When outputs that are offered again were delivered first."""
        self.full: dict[Replica, float] = {}
        self.line: deque[Microbatch] = deque()
        """Activations that wait for room at the next stage."""
        self.chasing = False
        self.looking: set[Replica] = set()
        """Neighbours that are down and asked whether they are back."""
        self.in_air: dict[Microbatch, Flight] = {}
        """Of a head: how those left that are not back."""
        self.started = 0
        self.holding = False
        """Of a head: whether what it starts now would not be back in time."""

    # -- work -----------------------------------------------------------------------------------------------------

    def submit(self, job: Job, microbatch: Microbatch) -> None:
        lane = Lane.FORWARD if job in (Job.FORWARD, Job.TAIL) else Lane.BACKWARD
        self._queued += 1
        heapq.heappush(self._lanes[lane], (microbatch.index, self._queued, job, microbatch))

    def take(self) -> tuple[Job, Microbatch] | None:
        """What the thread does next: a backward, if there is one."""
        for queue in self._lanes.values():
            if queue:
                _, _, job, microbatch = heapq.heappop(queue)
                return job, microbatch
        return None

    # -- rules ----------------------------------------------------------------------------------------------------

    def depth(self) -> int:
        """Microbatches a head keeps in flight."""
        return in_flight(
            stages=self.count,
            unit_seconds=self.unit_seconds.value,
            push_seconds=self.push_seconds.value,
            load=self.flights.load,
        )

    def has_room(self, capacity: int) -> bool:
        """Whether another activation is taken."""
        seconds = self.unit_seconds.value / 2
        limit = room(stages=self.count, unit_seconds=seconds, push_seconds=self.push_seconds.value, limit=capacity)
        return len(self.open) < capacity and self.work < limit

    def patience(self) -> float:
        return overdue_after(self._returns, crossing=self.crossing)

    @property
    def longest_flight(self) -> float:
        return longest_flight(self.flights.slowest, crossing=self.crossing)

    @property
    def crossing(self) -> float:
        return self.count * self.unit_seconds.value

    def came_back(self, microbatch: Microbatch, now: float) -> None:
        """The gradient of a delivered output is here."""
        awaited = self.awaited.pop(microbatch, None)
        if awaited is not None:
            self._returns.append(now - awaited[2])

    def is_full(self, other: Replica, now: float) -> bool:
        """Whether it has said so and not yet that there should be room."""
        until = self.full.get(other)
        if until is not None and until <= now:
            del self.full[other]
        return until is not None and until > now

    def missed(self, other: Replica, *, since: float, now: float) -> None:
        """A call that began at `since` did not reach it."""
        self.knows_down = True
        self._reach.failed(other.name, since=since, now=now)

    def is_down(self, other: Replica, now: float) -> bool:
        return self.knows_down and self._reach.is_down(other.name, now=now)
