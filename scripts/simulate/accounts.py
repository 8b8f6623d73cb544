"""Where the time went: seconds at work and idle by cause for every stage, and what became of every microbatch."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from scripts.simulate.replica import Job, Microbatch, Replica


class Idle(Enum):
    """Why a replica's compute thread has nothing to do."""

    FILLING = "filling"
    """Nothing of the round has reached it."""
    STARVED = "starved"
    """The next unit is on its way: the pipeline holds too few, or something else is slower."""
    DRAINING = "draining"
    """Heads start nothing more that would not be back before the round closes."""
    CLOSED = "closed"
    """Between two rounds' training."""
    DEAD = "dead"
    """Its place is vacant, or held by who waits for the next round."""


@dataclass
class StageAccount:
    """One stage, all its replicas together, seconds."""

    forward: float = 0.0
    backward: float = 0.0
    idle: dict[Idle, float] = field(default_factory=lambda: dict.fromkeys(Idle, 0.0))

    @property
    def busy(self) -> float:
        return self.forward + self.backward

    @property
    def total(self) -> float:
        return self.busy + sum(self.idle.values())

    @property
    def utilisation(self) -> float:
        """Share of all seconds at work, 0 to 1."""
        return self.busy / self.total if self.total else 0.0


class Timeline:
    """What is kept to be drawn; this one keeps nothing."""

    def worked(self, replica: Replica, *, forward: tuple[float, float] | None, backward: tuple[float, float]) -> None:
        """One unit: when its forward and its backward ran; of a plain forward the other one is empty."""

    def vacant(self, stage: int, place: int, start: float, end: float) -> None:
        """Nobody worked in a place."""


class Accounts:
    """Fed by the pipeline as things happen."""

    def __init__(self, stages: int, timeline: Timeline) -> None:
        self.stages = [StageAccount() for _ in range(stages)]
        self.started = 0
        self.lost = 0
        self.refused = 0
        """Offers to a replica that was full."""
        self.adopted = 0
        """Backwards computed in place of a sibling that was gone."""
        self.chased = 0
        """Activations offered again because their gradient was overdue."""
        self.gradients_lost = 0
        """Backward units of replicas that died before they were merged."""
        self.completed: list[float] = []
        """When each microbatch came back."""
        self.flight_seconds = 0.0
        """Of all completed ones in sum."""
        self._timeline = timeline
        self._draining_since: float | None = None
        self._since: dict[Replica, float] = {}

    def began(self, roster: tuple[tuple[Replica, ...], ...], now: float) -> None:
        """A round begins."""
        self._draining_since = None
        self._since = {replica: now for stage in roster for replica in stage}

    def draining(self, since: float | None) -> None:
        """All heads hold back since then; None if one of them starts again."""
        self._draining_since = since

    def takes(self, replica: Replica, now: float) -> None:
        """A unit begins on a replica that was idle or has just finished another."""
        since = self._since.pop(replica, now)
        if since < now:
            self._waited(replica, since, now)
        replica.units += 1

    def worked(self, replica: Replica, job: Job, start: float, end: float) -> None:
        """It has done a unit, or as much of it as there was time for."""
        account, seconds = self.stages[replica.stage], end - start
        share = replica.durations[Job.FORWARD] / replica.durations[Job.TAIL] if job in (Job.TAIL, Job.ADOPTED) else 0.0
        forward = seconds if job is Job.FORWARD else share * seconds
        account.forward += forward
        account.backward += seconds - forward
        self._timeline.worked(
            replica,
            forward=(start, start + forward) if forward else None,
            backward=(start + forward, end),
        )
        self._since[replica] = end

    def gone(self, replica: Replica, now: float) -> None:
        """It is dead, or the round is over: how long it has been idle is known."""
        since = self._since.pop(replica, now)
        if since < now:
            self._waited(replica, since, now)

    def idle(self, stage: int, cause: Idle, seconds: float) -> None:
        self.stages[stage].idle[cause] += seconds

    def vacant(self, stage: int, place: int, start: float, end: float) -> None:
        self.idle(stage, Idle.DEAD, end - start)
        self._timeline.vacant(stage, place, start, end)

    def landed(self, microbatch: Microbatch, seconds: float, now: float) -> None:
        microbatch.done = True
        self.completed.append(now)
        self.flight_seconds += seconds

    def _waited(self, replica: Replica, since: float, now: float) -> None:
        idle = self.stages[replica.stage].idle
        drained = 0.0 if self._draining_since is None else max(0.0, now - max(since, self._draining_since))
        idle[Idle.DRAINING] += drained
        idle[Idle.STARVED if replica.units else Idle.FILLING] += now - since - drained
