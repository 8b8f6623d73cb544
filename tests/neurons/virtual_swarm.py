"""A whole swarm of real workers in virtual time: seconds of training take as long as their bookkeeping.

Compute is stood in for by what moves the clock, the transport by a link model and a call. Everything between, from the
door to the ledger, is the code that miners run. A run is a function of its arguments.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import numpy as np
import torch

from model.split import split
from neurons.archive import Archive
from neurons.pipeline import StageWorker
from neurons.ring import capacity_of
from neurons.telemetry import MicrobatchDone, Telemetry, read_events
from scripts.bench.standin.engine import Hold, StandInEngine, StandInStage, Times
from scripts.bench.standin.node import INCARNATIONS, SEED, Swarm
from scripts.bench.standin.spec import SAMPLES, Boundary, Place, Spec, Steady
from scripts.sim.compute import VirtualCompute
from subnet.messages import Backward, Forward, HolderRequest, InputRequest, Notice
from subnet.transport.dendrite import Traffic
from subnet.transport.errors import Refused, Silent, Unreachable
from subnet.transport.shaping import Link, Shaper
from subnet.transport.synapse import Received, Synapse
from subnet.trust.ledger import NO_DIGEST
from tests.virtual import VirtualLoop

HEADERS = 500
"""Bytes of a message without tensors."""
STREAMS = 4
Answer = tuple[Synapse, Mapping[str, torch.Tensor]]


class Loop(VirtualLoop):
    """Its clock can be ahead while a job runs, and work for other threads is done at once."""

    ahead = 0.0

    def time(self) -> float:
        return super().time() + self.ahead

    def run_in_executor(self, _executor: object, func: Callable[..., Any], *args: object) -> asyncio.Future[Any]:
        answer = self.create_future()
        answer.set_result(func(*args))
        return answer


class VirtualHold(Hold):
    """Moves the clock instead of waiting."""

    def __init__(self, loop: Loop) -> None:
        super().__init__()
        self._loop = loop

    def __call__(self, seconds: float) -> None:
        self.asked += seconds
        self.took += seconds
        self._loop.ahead += seconds


class Member:
    """One life of a node."""

    streams = STREAMS

    def __init__(self, world: World, node: int, life: int) -> None:
        spec, swarm = world.spec, world.swarm
        self.world = world
        self.hotkey = swarm.identities[node].hotkey
        self.gone = asyncio.Event()
        self.shaper = Shaper(world.link, np.random.default_rng((node, life)))
        self.counters: dict[str, Traffic] = {}
        self._gates: dict[str, asyncio.Semaphore] = {}
        stage = node // spec.replicas
        plan = split(spec.model, spec.stages)[stage]
        self.hold = VirtualHold(asyncio.get_running_loop())  # type: ignore[arg-type]
        times = Times(spec.forward[stage], spec.backward[stage], spec.step)
        built = StandInStage(spec.model, plan, times, self.hold, seed=f"{node}/{life}")
        self.worker = StageWorker(
            identity=swarm.identities[node],
            loaded=swarm.loaded,
            engine=StandInEngine(
                built,
                swarm.loaded.manifest.optimizer.inner(),
                plan,
                accumulation=spec.accumulation,
                capacity=capacity_of(plan),
            ),
            corpus=swarm.corpus,
            dendrite=self,  # type: ignore[arg-type]
            endpoint_of=lambda hotkey: hotkey,
            telemetry=Telemetry(world.logs[node], now=asyncio.get_running_loop().time),
            compute=VirtualCompute,
        )
        self.round = self.worker.begin(0, swarm.roster, SEED, Archive(limit=0).open(0))
        self.round.started = self.round.lease = life * (SAMPLES // spec.replicas // INCARNATIONS)
        self.drive = asyncio.create_task(self.worker.drive()) if stage == 0 else None

    def end(self) -> None:
        self.gone.set()
        if self.drive is not None:
            self.drive.cancel()
        self.worker.shut_down()

    async def answer(self, caller: str, message: Synapse, tensors: Received) -> Answer:
        """What the axon does with a request."""
        handlers: dict[type, Callable[..., Awaitable[Answer]]] = {
            Forward: self.worker.on_forward,
            Backward: self.worker.on_backward,
            HolderRequest: self.worker.on_holder,
            InputRequest: self.worker.on_input,
            Notice: self.worker.on_notice,
        }
        return await handlers[type(message)](caller, message, tensors)

    async def call(
        self,
        _endpoint: str,
        receiver: str,
        message: Synapse,
        tensors: Mapping[str, torch.Tensor] | None = None,
        *,
        deadline: float,
        payload: bytes | None = None,
        **_reply: object,
    ) -> Answer:
        """What a dendrite does."""
        traffic = self.counters.setdefault(message.route, Traffic())
        traffic.calls += 1
        gate = self._gates.setdefault(receiver, asyncio.Semaphore(STREAMS))
        try:
            async with asyncio.timeout(deadline), gate:
                received = Received(tensors or {}, payload=payload or NO_DIGEST)
                return await self._exchange(receiver, message, received)
        except TimeoutError:
            traffic.failed += 1
            raise Silent(f"{receiver} said nothing") from None
        except Unreachable:
            traffic.failed += 1
            raise
        except Refused:
            traffic.refused += 1
            raise

    async def _exchange(self, receiver: str, message: Synapse, tensors: Received) -> Answer:
        size = HEADERS + (self.world.bytes if tensors else 0)
        await self.shaper.depart(size)
        other = self.world.alive.get(receiver)
        if other is None or self.gone.is_set():
            raise Unreachable(f"{receiver} is not there")
        await asyncio.gather(self.shaper.up.stream().carry(size), other.shaper.down.stream().carry(size))
        work = asyncio.ensure_future(other.answer(self.hotkey, message, tensors))
        reset = asyncio.ensure_future(other.gone.wait())
        try:
            await asyncio.wait({work, reset}, return_when=asyncio.FIRST_COMPLETED)
            if not other.gone.is_set():
                await self.shaper.arrive(HEADERS)
            if other.gone.is_set():
                raise Unreachable(f"{receiver} is gone")
            return work.result()
        finally:
            reset.cancel()
            work.cancel()


class World:
    """The nodes of one swarm and what they did."""

    def __init__(self, spec: Spec, link: Link, boundary_bytes: int) -> None:
        self.spec = spec
        self.swarm = Swarm.of(spec)
        self.link = link
        self.bytes = boundary_bytes
        """That a boundary tensor counts as on its way."""
        self.alive: dict[str, Member] = {}
        self.lives: list[list[Member]] = [[] for _ in spec.nodes]
        self.logs = [io.StringIO() for _ in spec.nodes]

    def start(self, node: int) -> None:
        member = Member(self, node, len(self.lives[node]))
        self.lives[node].append(member)
        self.alive[member.hotkey] = member

    def kill(self, node: int) -> None:
        member = self.lives[node][-1]
        del self.alive[member.hotkey]
        member.end()

    def done(self) -> dict[int, float]:
        """When each sample came back first, seconds."""
        found: dict[int, float] = {}
        for log in self.logs:
            for stamped in read_events(log.getvalue().splitlines()):
                if isinstance(stamped.event, MicrobatchDone):
                    at = found.get(stamped.event.sample, stamped.time)
                    found[stamped.event.sample] = min(at, stamped.time)
        return found

    def rate(self, begin: float, end: float) -> float:
        """Microbatches per second between two moments."""
        return sum(begin <= at < end for at in self.done().values()) / (end - begin)

    async def run(self, seconds: float, kills: Mapping[int, tuple[float, float]]) -> None:
        """For so long; `kills` says by node when it dies and when it is back."""
        for node in range(len(self.spec.nodes)):
            self.start(node)
        loop = asyncio.get_running_loop()
        for node, (at, back) in kills.items():
            loop.call_at(at, self.kill, node)
            loop.call_at(back, self.start, node)
        await asyncio.sleep(seconds)
        for member in self.alive.values():
            member.end()


def play(
    *,
    stages: int,
    replicas: int,
    forward: float,
    backward: float,
    link: Link,
    seconds: float,
    kills: Mapping[int, tuple[float, float]],
    boundary_bytes: int = 118_080,
) -> World:
    """One swarm from its start until `seconds` later."""
    spec = Spec(
        stages=stages,
        replicas=replicas,
        forward=[forward] * stages,
        backward=[backward] * stages,
        accumulation=16,
        boundary=Boundary(batch=1, sequence=8, width=4),
        nodes=[Place(host="127.0.0.1", port=1 + node) for node in range(stages * replicas)],
        steady=Steady(warm_up=0.0, seconds=seconds),
    )

    return run(spec, link, seconds=seconds, kills=kills, boundary_bytes=boundary_bytes)


def run(
    spec: Spec, link: Link, *, seconds: float, kills: Mapping[int, tuple[float, float]], boundary_bytes: int
) -> World:
    """`play` of a spec."""

    async def whole() -> World:
        world = World(spec, link, boundary_bytes)
        await world.run(seconds, kills)
        return world

    with asyncio.Runner(loop_factory=Loop) as runner:
        return runner.run(whole())
