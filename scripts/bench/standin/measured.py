"""What a process of a stand-in swarm says about its nodes."""

from __future__ import annotations

from dataclasses import dataclass, field, fields


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """What a node has counted since its first start."""

    units: int
    """Backwards."""
    rerouted: int
    """Forwards that another replica than the planned one took."""
    adopted: int
    """Backwards in place of a sibling that was gone."""
    chased: int
    """Outputs offered to another replica because their gradient was overdue."""
    held_seconds: float
    """For which its compute was asked to be held."""
    busy_seconds: float
    """For which it was: more where the machine is too busy to wake a thread in time."""

    def since(self, before: Counts) -> Counts:
        return Counts(**{item.name: getattr(self, item.name) - getattr(before, item.name) for item in fields(self)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """What one node did within the window, of which `routes` is all since its start."""

    stage: int
    lives: int
    """Starts: one more than kills that it came back from."""
    counts: Counts
    routes: dict[str, dict[str, int]]
    depth: int = 0
    """Of a head: microbatches it kept in flight at the end."""
    done: list[tuple[int, float]] = field(default_factory=list)
    """Of a head: samples that came back here since the start, and when, in seconds after it."""
    warm_up_seconds: float = 0.0
    step_seconds: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One process."""

    window: tuple[float, float]
    """What was measured, in seconds after the start."""
    cpu_seconds: float
    """Processor time of the process within it."""
    nodes: dict[int, Node]
