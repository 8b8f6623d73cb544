"""One node of a stand-in swarm: the real worker, axon and dendrite, started, killed and started afresh.

A kill is what SIGKILL is to a node's neighbours: connections are reset, nobody listens, open work is gone. The one that
comes back has the same hotkey and address and knows nothing. A head that did would start its samples again, so a real
one sits the round out; here, where there is one round only, each incarnation of a head has indices of its own.
"""

from __future__ import annotations

import asyncio
import io
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass

import numpy as np

from model.data import Corpus
from model.split import split
from neurons.archive import Archive
from neurons.pipeline import StageWorker
from neurons.ring import capacity_of
from neurons.telemetry import MicrobatchDone, Telemetry, read_events
from neurons.training import TrainingRound
from scripts.bench.standin.engine import Hold, StandInEngine, StandInStage, Times
from scripts.bench.standin.measured import Counts
from scripts.bench.standin.spec import SAMPLES, Spec, Steps
from subnet.identity import Identity
from subnet.manifest import LoadedManifest
from subnet.messages import Backward, Forward, HolderRequest, InputRequest, Notice, Shapes
from subnet.swarm.roster import Roster
from subnet.transport.admission import Admission
from subnet.transport.axon import Axon
from subnet.transport.dendrite import Dendrite
from subnet.transport.shaping import Shaper

SEED = b"stand-in routing"
INCARNATIONS = 256
"""Of one head at most: what its part of the round's samples is shared among."""


@dataclass(frozen=True, slots=True)
class Swarm:
    """What all nodes of a swarm agree on."""

    spec: Spec
    loaded: LoadedManifest
    corpus: Corpus
    identities: tuple[Identity, ...]
    roster: Roster
    endpoints: Mapping[str, str]
    """By hotkey."""

    @classmethod
    def of(cls, spec: Spec) -> Swarm:
        identities = tuple(Identity.from_uri(f"//stand-in-{spec.seed}-{node}") for node in range(len(spec.nodes)))
        hotkeys = [identity.hotkey for identity in identities]
        return cls(
            spec=spec,
            loaded=spec.manifest(),
            corpus=spec.corpus(),
            identities=identities,
            roster=Roster.of([hotkeys[s * spec.replicas : (s + 1) * spec.replicas] for s in range(spec.stages)]),
            endpoints={hotkey: place.endpoint for hotkey, place in zip(hotkeys, spec.nodes, strict=True)},
        )


@dataclass(frozen=True, slots=True)
class Done:
    """A microbatch that came back here."""

    sample: int
    at: float
    """Unix time, seconds."""
    depth: int
    """Microbatches that this head kept in flight then."""


class Incarnation:
    """From a start to the next kill."""

    def __init__(self, *, hold: Hold, worker: StageWorker, axon: Axon, dendrite: Dendrite, held: TrainingRound) -> None:
        self.hold = hold
        self.worker = worker
        self.axon = axon
        self.dendrite = dendrite
        self.round = held
        self.drive: asyncio.Task[None] | None = None

    async def end(self) -> None:
        self.hold.end()
        if self.drive is not None:
            self.drive.cancel()
        self.worker.shut_down()
        await self.axon.stop(abruptly=True)
        await self.dendrite.stop()


class StandIn:
    """A node of the swarm, over all its incarnations."""

    def __init__(self, swarm: Swarm, node: int) -> None:
        self.node = node
        self.stage = node // swarm.spec.replicas
        self._swarm = swarm
        self._identity = swarm.identities[node]
        self._place = swarm.spec.nodes[node]
        self._log = io.StringIO()
        self._lives: list[Incarnation] = []

    @property
    def lives(self) -> int:
        return len(self._lives)

    async def start(self) -> None:
        """Listen and begin the round, with nothing."""
        spec, loaded = self._swarm.spec, self._swarm.loaded
        plan = split(spec.model, spec.stages)[self.stage]
        number = len(self._lives)
        if number == INCARNATIONS:
            raise ValueError(f"node {self.node} was killed {number} times, limit {INCARNATIONS - 1}: list fewer kills")
        link = self._place.link
        shaper = None if link is None else Shaper(link, np.random.default_rng((spec.seed, self.node, number)))
        hold = Hold()
        times = Times(spec.forward[self.stage], spec.backward[self.stage], spec.step)
        stage = StandInStage(spec.model, plan, times, hold, seed=f"{spec.seed}/{self.node}/{number}")
        dendrite = Dendrite(self._identity, now_ns=time.time_ns, shaper=shaper)
        worker = StageWorker(
            identity=self._identity,
            loaded=loaded,
            engine=StandInEngine(
                stage,
                loaded.manifest.optimizer.inner(),
                plan,
                accumulation=spec.accumulation,
                capacity=capacity_of(plan),
            ),
            corpus=self._swarm.corpus,
            dendrite=dendrite,
            endpoint_of=self._swarm.endpoints.get,
            telemetry=Telemetry(self._log, now=time.time),
        )
        axon = Axon(
            Admission(self._identity.hotkey, allow=lambda _hotkey, _route: None, now_ns=time.time_ns),
            host=self._place.host,
            port=self._place.port,
            shaper=shaper,
        )
        shapes = Shapes.of(loaded.manifest)
        axon.serve(Forward, worker.on_forward, specs={"y": shapes.boundary})
        axon.serve(Backward, worker.on_backward, specs={"g": shapes.boundary})
        axon.serve(HolderRequest, worker.on_holder, specs={})
        axon.serve(InputRequest, worker.on_input, specs={})
        axon.serve(Notice, worker.on_notice, specs={})
        # No closed window is kept: nobody audits, and a swarm in one machine has one machine's memory.
        current = worker.begin(0, self._swarm.roster, SEED, Archive(limit=0).open(0))
        current.started = current.lease = number * (SAMPLES // spec.replicas // INCARNATIONS)
        await dendrite.start()
        await axon.start()
        self._lives.append(Incarnation(hold=hold, worker=worker, axon=axon, dendrite=dendrite, held=current))

    async def kill(self) -> None:
        """End at once."""
        await self._lives[-1].end()

    def drive(self) -> None:
        """At a head: start microbatches until `kill` or `stop`."""
        if self.stage == 0:
            self._lives[-1].drive = asyncio.create_task(self._lives[-1].worker.drive())

    def stop(self) -> None:
        """At a head: start nothing more."""
        self._lives[-1].worker.stop()

    async def steps(self, steps: Steps) -> tuple[float, list[float]]:
        """At a head: seconds of the warm-up and of each step."""
        loop, worker = asyncio.get_running_loop(), self._lives[-1].worker
        seconds = []
        for number in range(steps.warm_up + steps.count):
            start = loop.time()
            await worker.drive(limit=(number + 1) * steps.microbatches)
            seconds.append(loop.time() - start)
        return sum(seconds[: steps.warm_up]), seconds[steps.warm_up :]

    def counted(self) -> Counts:
        rounds, holds = [life.round for life in self._lives], [life.hold for life in self._lives]
        return Counts(
            units=sum(each.units for each in rounds),
            rerouted=sum(each.rerouted for each in rounds),
            adopted=sum(each.adopted for each in rounds),
            chased=sum(each.chased for each in rounds),
            held_seconds=sum(hold.asked for hold in holds),
            busy_seconds=sum(hold.took for hold in holds),
        )

    def routes(self) -> dict[str, dict[str, int]]:
        """Calls and bytes by route, of all incarnations."""
        found: dict[str, Counter[str]] = {}
        for life in self._lives:
            for route, traffic in life.dendrite.counters.items():
                found.setdefault(route, Counter()).update(asdict(traffic))
        return {route: dict(counts) for route, counts in found.items()}

    def done(self) -> Iterator[Done]:
        """Microbatches that came back here, a sibling's that were taken over included, in order."""
        for stamped in read_events(self._log.getvalue().splitlines()):
            match stamped.event:
                case MicrobatchDone(sample=sample, depth=depth):
                    yield Done(sample, stamped.time, depth)
