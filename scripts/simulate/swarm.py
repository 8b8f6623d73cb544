"""A swarm over time: rounds one after the other, failures and who comes in their place, and what it came to."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from scripts.simulate.accounts import Accounts, Idle, StageAccount, Timeline
from scripts.simulate.events import Clock
from scripts.simulate.merges import Transfer
from scripts.simulate.network import Network, Port
from scripts.simulate.pipeline import Pipeline
from scripts.simulate.replica import Replica
from scripts.simulate.setting import Setting

HOUR = 3600.0


@dataclass(frozen=True, slots=True)
class Failure:
    """A replica is gone from one instant to the next."""

    at: float
    stage: int
    place: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a simulated stretch of time came to."""

    seconds: float
    started: int
    completed: tuple[float, ...]
    """When each microbatch came back, seconds from the start."""
    lost: int
    """At the close of a round."""
    in_flight: int
    """At the end."""
    stages: tuple[StageAccount, ...]
    failures: tuple[Failure, ...]
    gradients_lost: int
    adopted: int
    chased: int
    refused: int
    flight_seconds: float
    """Mean, of those that came back."""
    depth: float
    """Microbatches that heads keep in flight at the end, mean."""
    calls: int
    """Events played."""

    def rate(self, start: float = 0.0, end: float = math.inf) -> float:
        """Microbatches per second that came back between two times."""
        end = min(end, self.seconds)
        return sum(start < moment <= end for moment in self.completed) / (end - start)

    @property
    def utilisation(self) -> float:
        """Of the stage that has most to do."""
        return max(stage.utilisation for stage in self.stages)


def failures_of(setting: Setting) -> Iterator[Failure]:
    """Drawn from the seed alone. A place that is vacant when it fails stays as it is."""
    rate = setting.churn.failures_per_hour / HOUR
    chance = np.random.default_rng(setting.seed)
    at = 0.0
    while rate:
        at += float(chance.exponential(1 / rate))
        if at > setting.seconds:
            return
        yield Failure(at, int(chance.integers(setting.stages)), int(chance.integers(setting.replicas)))


class _Swarm:
    def __init__(
        self, setting: Setting, timeline: Timeline, failures: Iterable[Failure], transfers: Sequence[Transfer]
    ) -> None:
        self.setting = setting
        self.transfers = transfers
        self.failures = tuple(failures)
        self.clock = Clock()
        self.accounts = Accounts(setting.stages, timeline)
        self.network = Network(self.clock, latency=setting.pipeline.latency, wires=setting.wires)
        self.pipeline = Pipeline(self.clock, self.network, setting, self.accounts)
        self.places: list[list[Replica]] = [
            [self._replica(stage, place, 0) for place in range(setting.replicas)] for stage in range(setting.stages)
        ]
        self.ready: list[Replica] = []
        """Who waits for a round to begin in order to join."""
        self.joining: list[Replica] = []
        """Who catches up in this round and works from the next one on."""
        self.dying: set[Replica] = set()
        """Who has died since this round began."""
        self.vacant: dict[tuple[int, int], float] = {}
        """Since when nobody works in a place."""
        self.closed_at: float | None = None
        """When training ended, between two rounds."""
        self.struck: list[Failure] = []

    def run(self) -> Result:
        setting, clock = self.setting, self.clock
        clock.at(0.0, self._begin, 0)
        for failure in self.failures:
            clock.at(failure.at, self._fail, failure)
        clock.run(setting.seconds)
        in_flight = self.pipeline.in_flight
        self.pipeline.settle()
        self._settle_closed()
        for (stage, place), since in self.vacant.items():
            self.accounts.vacant(stage, place, since, setting.seconds)
        accounts = self.accounts
        return Result(
            seconds=setting.seconds,
            started=accounts.started,
            completed=tuple(accounts.completed),
            lost=accounts.lost,
            in_flight=in_flight,
            stages=tuple(accounts.stages),
            failures=tuple(self.struck),
            gradients_lost=accounts.gradients_lost,
            adopted=accounts.adopted,
            chased=accounts.chased,
            refused=accounts.refused,
            flight_seconds=accounts.flight_seconds / max(1, len(accounts.completed)),
            depth=self._depth(),
            calls=clock.calls,
        )

    def _depth(self) -> float:
        if not self.setting.measured_depth:
            return self.setting.pipeline.depth
        depths = [head.depth() for head in self.places[0] if head.alive]
        return sum(depths) / max(1, len(depths))

    def _replica(self, stage: int, place: int, generation: int) -> Replica:
        setting = self.setting
        return Replica(
            f"stage {stage} place {place} generation {generation}",
            stage=stage,
            place=place,
            count=setting.stages,
            speed=setting.pipeline.stages[stage][place],
        )

    def _begin(self, number: int) -> None:
        setting, clock = self.setting, self.clock
        now = clock.now
        self._settle_closed()
        for replica in self.joining:
            self.places[replica.stage][replica.place] = replica
            self.accounts.vacant(replica.stage, replica.place, self.vacant.pop((replica.stage, replica.place)), now)
        self.joining, self.ready = self.ready, []
        # The last record of who died in the last round still speaks for it.
        members = [[replica for replica in stage if replica.alive or replica in self.dying] for stage in self.places]
        self.dying.clear()
        roster = tuple(tuple(sorted(stage, key=lambda replica: replica.name)) for stage in members)
        closing_at = now + setting.rounds.close
        if math.isfinite(setting.rounds.length):
            clock.at(closing_at, self._close)
            clock.at(now + setting.rounds.length, self._begin, number + 1)
        seed = hashlib.sha256(f"{setting.seed}/{number}".encode()).digest()
        self.pipeline.begin(number, roster, seed, closing_at=closing_at)

    def _close(self) -> None:
        self.pipeline.close()
        self.closed_at = self.clock.now
        for places in self.places:
            ports = [replica.port for replica in places]
            for transfer in self.transfers:
                ends = (ports[transfer.sender], ports[transfer.receiver])
                self.clock.at(self.clock.now + transfer.start, _stream, *ends, 1)
                self.clock.at(self.clock.now + transfer.end, _stream, *ends, -1)

    def _settle_closed(self) -> None:
        """What the time since the last round's training was to each place."""
        closed_at, self.closed_at = self.closed_at, None
        if closed_at is None:
            return
        for stage, place in product(range(len(self.places)), range(self.setting.replicas)):
            ends = self.vacant.get((stage, place), self.clock.now)
            self.accounts.idle(stage, Idle.CLOSED, max(0.0, ends - closed_at))

    def _fail(self, failure: Failure) -> None:
        replica = self.places[failure.stage][failure.place]
        if not replica.alive:
            return
        now = self.clock.now
        self.struck.append(failure)
        self.dying.add(replica)
        self.pipeline.kill(replica)
        self.vacant[failure.stage, failure.place] = now
        self.clock.at(now + self.setting.churn.ready_after, self._arrive, replica, len(self.struck))

    def _arrive(self, dead: Replica, generation: int) -> None:
        """Somebody is there who will join when the next round begins."""
        self.ready.append(self._replica(dead.stage, dead.place, generation))


def _stream(sender: Port, receiver: Port, more: int) -> None:
    """A merge's stream opens or ends."""
    sender.up_streams += more
    receiver.down_streams += more


def simulate(
    setting: Setting,
    timeline: Timeline | None = None,
    *,
    failures: Iterable[Failure] | None = None,
    transfers: Sequence[Transfer] = (),
) -> Result:
    """Play `setting.seconds` of a swarm's life. The same setting gives the same result.

    Args:
        failures: in place of those that the setting's rate and seed draw.
        transfers: of the merge that begins in every stage when a round closes.
    """
    failures = failures_of(setting) if failures is None else failures
    return _Swarm(setting, timeline or Timeline(), failures, transfers).run()
