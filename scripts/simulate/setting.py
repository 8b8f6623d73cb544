"""What is simulated: a swarm's shape, its links, its rounds and its churn, all in seconds and bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum


class SettingError(ValueError):
    """A setting that cannot be simulated: one line with the value, the limit and the option to change."""


class Wires(Enum):
    """What shares a line."""

    NODE = "node"
    """A node's uplink carries all it sends, its downlink all it receives."""
    PAIR = "pair"
    """Every pair of nodes has a line of its own in each direction, as in published pipeline benchmarks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTime:
    """Seconds of one microbatch at one stage, on a replica of speed 1."""

    forward: float
    backward: float
    """With what a backward must compute again."""

    @property
    def both(self) -> float:
        return self.forward + self.backward


@dataclass(frozen=True, slots=True, kw_only=True)
class Lines:
    """The network of every node."""

    up: float = math.inf
    """Bits per second."""
    down: float = math.inf
    latency: float = 0.0
    """Seconds, one way."""
    wires: Wires = Wires.NODE


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounds:
    """When a round trains; the default is one that never ends."""

    length: float = math.inf
    """Seconds from the start of a round to the start of the next."""
    close: float = math.inf
    """Seconds from the start of a round to the end of its training."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Churn:
    """Failures come at random: every replica's place in the swarm fails at the same rate."""

    failures_per_hour: float = 0.0
    """Of the whole swarm, while it is complete."""
    replaced_after: float = 600.0
    """Seconds until somebody else has the place, with the stage's state; it works from the next round on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Everything that a simulation depends on."""

    stages: tuple[StageTime, ...]
    replicas: int
    boundary_bytes: int
    """Of an activation, and of its gradient."""
    seconds: float
    lines: Lines = field(default_factory=Lines)
    rounds: Rounds = field(default_factory=Rounds)
    churn: Churn = field(default_factory=Churn)
    speeds: tuple[tuple[float, ...], ...] = ()
    """By stage and replica, where not all are 1."""
    depth: int | None = None
    """Microbatches in flight per head; None for what heads compute from measured times."""
    microbatches: int | None = None
    """That each head starts in a round, at most."""
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises `SettingError`."""
        checks = (
            ("--stages", len(self.stages), 1, math.inf),
            ("--replicas", self.replicas, 1, math.inf),
            ("--minutes", self.seconds / 60, 1e-3, 1e7),
            ("--up in bit/s", self.lines.up, 1.0, math.inf),
            ("--down in bit/s", self.lines.down, 1.0, math.inf),
            ("--rtt in s", 2 * self.lines.latency, 0.0, 600.0),
            ("--failures-per-hour", self.churn.failures_per_hour, 0.0, 1e6),
            ("--replace-minutes", self.churn.replaced_after / 60, 0.0, math.inf),
            ("--depth", 1 if self.depth is None else self.depth, 1, math.inf),
        )
        for option, value, least, most in checks:
            if not least <= value <= most:
                raise SettingError(f"{option} is {value:g}, outside {least:g} to {most:g}: choose one inside")
        if self.speeds and [len(stage) for stage in self.speeds] != [self.replicas] * len(self.stages):
            raise SettingError(
                f"speeds are not {len(self.stages)} stages of {self.replicas} replicas: name all or none"
            )
        slowest = min((speed for stage in self.speeds for speed in stage), default=1.0)
        if not slowest > 0 or not all(stage.forward > 0 and stage.backward > 0 for stage in self.stages):
            raise SettingError("a stage takes no time or has no speed: give times and speeds above 0")

    def speed(self, stage: int, place: int) -> float:
        return self.speeds[stage][place] if self.speeds else 1.0
