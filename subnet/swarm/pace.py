"""How fast a pipeline of replicas runs, in closed form: pure arithmetic on measured or planned times.

Heads keep W microbatches in flight each, n = W·heads in all. Three things bound the swarm's rate X (microbatches/s):

    a stage   sum over its replicas of 1 / (F + B): the door lets each take what it computes, so rates add up
    a link    a replica sends its output on and the input's gradient back, both through one uplink; the same downwards
    depth     n microbatches cannot come back faster than once per round trip each (Little's law)

Round trip of an empty pipeline, stages s, hops between them (facts: sota §2.2; L one way, x transfer seconds):

    T_loop = sum_s (F_s + B_s) + sum_hops (2L + x_f + x_b)

How much deeper than T_loop the pipeline must be depends on how evenly units arrive, because what comes late leaves a
stage idle and what comes early waits. C is the rate of the slowest stage or link, r_s = C ÷ rate of stage s, R the mean
number of replicas, P the number of stages:

    lanes     X = n / (T_loop + w),  1 - X/C = V/w²,  V = sum_s (v_s + d·U_s²)                        U_s = F_s + B_s
    lottery   X = min(lanes that stay, C·n / (n + k·(sum_s R_s·r_s² - 1) + Z·C)), k = (1 - 1/R²) (1 + c²) / 2

Lanes: w is what a microbatch waits on a round trip, and the reserve that keeps a stage busy when the next unit is late.
Lateness has mean 0 and variance V, so it exceeds w no more often than V/w² (Chebyshev), and taken as an equality this
closes Little's law. V has three parts:

    met       A unit that meets one of the other direction waits for what is left of that, anything from nothing to all:
              F²/12 + B²/12. An interval has two ends, so (F² + B²)/6. The tail does both at once and meets nothing.
    order     Where forwards and backwards do not alternate, two units in a row take 2F or 2B, which are 2(B - F) apart.
              A tail that needs the share u of the slowest stage's time returns its gradient so much later, so the stage
              before it meets one or the other with odds u : 1 - u: Bernoulli, 4u(1 - u)(B - F)². A tail as slow as the
              slowest stage sets an even beat, and this part is gone.
    drawn     A draw takes P microbatches to pass through. Meanwhile (P of `lane`) arrivals are those of streams that
              know nothing of each other: Poisson's, of variance U² a stage, where the replica changes (1 - 1/R).
              d = (1 - 1/R)·min(1, P/lane).

v_s is the sum of the first two. These are arguments for terms that were chosen by measurement, and no proof. V was
measured first, by event simulation (`scripts.simulate`) of 4 to 32 stages, B/F of 1 to 3, tails of 0.4 to 1 and draws
every 32 and 64 microbatches of 3 replicas; of the terms with a reason those were taken that follow it. No factor is a
regression's, but several reasons were tried. There V is off by up to half from 24 stages on and for a tail that is
nearly as slow as the rest. docs/simulate.md has settings that were compared afterwards, and where it fails.

Lottery: a balanced-job bound of closed queueing networks (Zahorjan et al., CACM 25(2), 1982), with Z the network
seconds of a round trip and Pollaczek and Khinchine's mean residual of units whose lengths vary by c. R in the factor
before it is the mean number of replicas: where each is visited once in R microbatches of a head, a single one leaves
nothing to chance. It is within 5 % of event simulation from W = 16 on (tests/subnet/test_pace.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from subnet.swarm.routing import LANE

HALVINGS = 60
"""Of an interval of length 1: as far as floats go."""


class PaceError(ValueError):
    """Numbers that describe no pipeline: one line with the value, the limit and what to change."""


class Routing(StrEnum):
    """How a microbatch finds a replica at each stage."""

    LANES = "lanes"
    """A head's microbatches take the same replicas for a while, heads different ones: arrivals stay evenly spaced."""
    LOTTERY = "lottery"
    """Every head draws for every microbatch: arrivals at a replica are random."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replica:
    """One miner's pace at its stage."""

    forward: float
    """Seconds for a microbatch; 0 where the backward includes it (tail)."""
    backward: float
    """Seconds for a microbatch, recomputing and the optimizer's share included."""
    up: float
    """Bits per second."""
    down: float

    @property
    def unit(self) -> float:
        """F + B."""
        return self.forward + self.backward


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """What a pace follows from. Raises `PaceError`."""

    stages: tuple[tuple[Replica, ...], ...]
    """Replicas of each stage; those of the first are the heads."""
    forward_bytes: int
    """Of a boundary tensor on the wire."""
    backward_bytes: int
    """Of its gradient."""
    latency: float
    """Seconds one way."""
    depth: int
    """W: microbatches in flight per head."""
    routing: Routing
    lane: int = LANE
    """Microbatches of a head between two draws of its lane."""

    def __post_init__(self) -> None:
        if not self.stages or not all(self.stages):
            raise PaceError("a stage has no replica: nothing passes, add replicas")
        if self.depth < 1 or self.lane < 1 or self.latency < 0:
            raise PaceError(
                f"depth is {self.depth}, lane {self.lane} and latency {self.latency}; they must be at least 1, 1 "
                "and 0: change them"
            )
        for index, stage in enumerate(self.stages):
            for replica in stage:
                if not replica.unit > 0:
                    raise PaceError(f"stage {index} takes {replica.unit} s for a microbatch; it must be above 0")
                if len(self.stages) > 1 and (not replica.up > 0 or not replica.down > 0):
                    raise PaceError(
                        f"stage {index} has a link of {replica.up:g} bit/s up and {replica.down:g} bit/s down, through "
                        "which nothing passes: raise the bandwidth"
                    )

    @property
    def in_flight(self) -> int:
        """n, in the whole swarm."""
        return self.depth * len(self.stages[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """What follows. Rates are microbatches per second of the whole swarm."""

    rate: float
    capacity: float
    """Of the slowest stage or link."""
    compute: tuple[float, ...]
    """Rate of each stage if nothing but its computing bound it."""
    round_trip: float
    """T_loop: seconds of a microbatch through an empty pipeline."""
    network: float
    """Of these, seconds under way between stages."""
    flight: float
    """Seconds of a microbatch through the pipeline as full as it is."""
    binding: str
    """What bounds the rate: `compute of stage 3`, `link of stage 3`, or `depth`."""

    @property
    def interval(self) -> float:
        """Seconds between two microbatches of the swarm."""
        return 1 / self.rate

    @property
    def utilisation(self) -> tuple[float, ...]:
        """Share of its time that each stage computes."""
        return tuple(self.rate / rate for rate in self.compute)


def pace(pipeline: Pipeline) -> Pace:
    """The steady state of a pipeline that is neither filling nor draining."""
    stages, n = pipeline.stages, pipeline.in_flight
    compute = tuple(sum(1 / replica.unit for replica in stage) for stage in stages)
    links = tuple(_link_rate(pipeline, index) for index in range(len(stages)))
    slowest = min(range(len(stages)), key=lambda index: min(compute[index], links[index]))
    capacity = min(compute[slowest], links[slowest])
    network = network_seconds(pipeline)
    round_trip = network + sum(len(stage) / rate for stage, rate in zip(stages, compute, strict=True))
    share = sum(map(len, stages)) / len(stages)
    drawn = (1 - 1 / share) * min(1.0, len(stages) / pipeline.lane)
    lateness = sum(_variances(pipeline, capacity))
    if pipeline.routing is Routing.LANES:
        lateness += drawn * sum((len(stage) / rate) ** 2 for stage, rate in zip(stages, compute, strict=True))
    rate = _closed(n, capacity=capacity, round_trip=round_trip, variance=lateness)
    if pipeline.routing is Routing.LOTTERY and share > 1:
        loads = sum(len(stage) * (capacity / each) ** 2 for stage, each in zip(stages, compute, strict=True))
        queued = (1 - share**-2) * _residual(pipeline) * (loads - 1)
        rate = min(rate, capacity * n / (n + queued + network * capacity))
    if n / round_trip < capacity:
        binding = "depth"
    else:
        binding = f"{'compute' if compute[slowest] <= links[slowest] else 'link'} of stage {slowest}"
    return Pace(
        rate=rate,
        capacity=capacity,
        compute=compute,
        round_trip=round_trip,
        network=network,
        flight=n / rate,
        binding=binding,
    )


def network_seconds(pipeline: Pipeline) -> float:
    """What a microbatch spends between stages, there and back: sum over hops of 2L + x_f + x_b."""
    total = 0.0
    for senders, receivers in zip(pipeline.stages, pipeline.stages[1:], strict=False):
        total += 2 * pipeline.latency
        total += _transfer(pipeline.forward_bytes, senders, receivers)
        total += _transfer(pipeline.backward_bytes, receivers, senders)
    return total


def _closed(n: int, *, capacity: float, round_trip: float, variance: float) -> float:
    """The X at which n = X·(T_loop + w) and 1 - X/C = variance/w². What n must be grows with X, so it is halved in on.

    Args:
        variance: of how late units are, summed over a round trip, seconds².
    """
    spread = math.sqrt(variance)
    low, high = 0.0, 1.0  # of what is left of capacity, as a root: y² = 1 - X/C
    for _ in range(HALVINGS):
        left = (low + high) / 2
        needed = capacity * (1 - left**2) * (round_trip + spread / left)
        low, high = (left, high) if needed > n else (low, left)
    return min(capacity * (1 - high**2), n / round_trip)


def _variances(pipeline: Pipeline, capacity: float) -> Iterator[float]:
    """How late units of each stage before the tail are, where lanes stay: seconds²."""
    tail = sum(1 / replica.unit for replica in pipeline.stages[-1])
    odds = min(1.0, capacity / tail)
    for stage in pipeline.stages[:-1]:
        forward = sum(replica.forward for replica in stage) / len(stage)
        backward = sum(replica.backward for replica in stage) / len(stage)
        yield (forward**2 + backward**2) / 6 + 4 * odds * (1 - odds) * (backward - forward) ** 2


def _transfer(size: int, senders: tuple[Replica, ...], receivers: tuple[Replica, ...]) -> float:
    """Mean seconds of `size` bytes between two stages: the narrower of two links binds."""
    seconds = [8 * size / min(sender.up, receiver.down) for sender in senders for receiver in receivers]
    return sum(seconds) / len(seconds)


def _link_rate(pipeline: Pipeline, index: int) -> float:
    """Microbatches per second that the links of a stage carry."""
    last = len(pipeline.stages) - 1
    if last == 0:
        return float("inf")
    up = (pipeline.forward_bytes if index < last else 0) + (pipeline.backward_bytes if index > 0 else 0)
    down = (pipeline.forward_bytes if index > 0 else 0) + (pipeline.backward_bytes if index < last else 0)
    return sum(min(replica.up / (8 * up), replica.down / (8 * down)) for replica in pipeline.stages[index])


def _residual(pipeline: Pipeline) -> float:
    """(1 + c²)/2 of the units' lengths: what is left, in mean lengths, of a unit that is met at a random time."""
    lengths = [
        length
        for stage in pipeline.stages[:-1]
        for replica in stage
        for length in (replica.forward, replica.backward)
        if length > 0
    ]
    lengths += [replica.unit for replica in pipeline.stages[-1]]
    mean = sum(lengths) / len(lengths)
    return sum(length**2 for length in lengths) / len(lengths) / mean**2 / 2
