"""What is simulated: a pipeline of replicas and their links, its rounds and its churn. Times are seconds."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum

from subnet.swarm.pace import Pipeline


class SettingError(ValueError):
    """A setting that cannot be simulated: one line with the value, the limit and the option to change."""


class Wires(Enum):
    """What shares a line."""

    NODE = "node"
    """A node's uplink carries all it sends, its downlink all it receives."""
    PAIR = "pair"
    """Every pair of nodes has a line of its own in each direction, as in published pipeline benchmarks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounds:
    """When a round trains; the default is one that never ends."""

    length: float = math.inf
    """From the start of a round to the start of the next."""
    close: float = math.inf
    """From the start of a round to the end of its training."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Churn:
    """Replicas that are gone without a word. Every place in the swarm fails at the same rate.

    Who is gone stays in the roster of the next round, for which its last record still speaks. Who comes in its place
    joins with the first round that begins when it is ready, catches up, and works from the one after.
    """

    failures_per_hour: float = 0.0
    """Of the whole swarm, while it is complete."""
    ready_after: float = 600.0
    """From a failure until a newcomer is there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Everything that a simulation depends on."""

    pipeline: Pipeline
    """All stages have equally many replicas. Routing is by lanes, as nodes route, whatever it says."""
    seconds: float
    wires: Wires = Wires.NODE
    rounds: Rounds = field(default_factory=Rounds)
    churn: Churn = field(default_factory=Churn)
    measured_depth: bool = False
    """Whether heads compute from measured times how many they keep in flight, or keep the pipeline's depth."""
    microbatches: int | None = None
    """That each head starts in a round, at most."""
    jitter: float = 0.1
    """Units take up to this share more or less than planned, drawn evenly. Without it heads march in step, and collide
    always or never."""
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises `SettingError`."""
        checks = (
            ("--minutes", self.seconds / 60, 1e-3, 1e7),
            ("--failures-per-hour", self.churn.failures_per_hour, 0.0, 1e6),
            ("--ready-minutes", self.churn.ready_after / 60, 0.0, 1e7),
            ("--jitter", self.jitter, 0.0, 0.9),
        )
        for option, value, least, most in checks:
            if not least <= value <= most:
                raise SettingError(f"{option} is {value:g}, outside {least:g} to {most:g}: choose one inside")
        counts = {len(stage) for stage in self.pipeline.stages}
        if len(counts) != 1:
            raise SettingError(f"stages have {sorted(counts)} replicas: give all stages equally many")
        if not 0 < self.rounds.close <= self.rounds.length:
            raise SettingError(
                f"a round trains {self.rounds.close:g} s of its {self.rounds.length:g}: lengthen --round-minutes"
            )

    @property
    def stages(self) -> int:
        return len(self.pipeline.stages)

    @property
    def replicas(self) -> int:
        """Of each stage."""
        return len(self.pipeline.stages[0])
