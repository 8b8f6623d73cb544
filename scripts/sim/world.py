"""A whole swarm in one process: every node as it runs elsewhere, on simulated hosts, sockets, chain and clock."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Final, Protocol

import bittensor_core
import numpy as np

from model.config import BoundaryConfig, BoundaryForm, ModelConfig
from model.data import ShardEntry
from model.optimizer import OptimizerConfig
from neurons.config import NeuronConfig
from neurons.machine import Footprint
from neurons.miner import mine
from neurons.node import Node, Surroundings
from neurons.telemetry import NodeFailed
from neurons.validator import validate
from scripts.manifests import DECAY, MEAN, marks_of
from scripts.sim.chain import EPOCH_MS, Blocks, SimChain
from scripts.sim.clock import Life, SimLoop
from scripts.sim.compute import Pace, machine_at
from scripts.sim.faults import DOWN, Fault, Kind, draw
from scripts.sim.repeater import Repeater
from scripts.sim.wire import Host, Line, Network
from subnet.chain_errors import one_line
from subnet.identity import SCHEME, Identity
from subnet.localchain.genesis import OWNER_HOTKEY_URI, address
from subnet.manifest import (
    Announcement,
    AuditSection,
    DataSection,
    LoadedManifest,
    Manifest,
    MergeSection,
    ModelSection,
    OptimizerSection,
    RunSection,
    ScoreSection,
    ShardSection,
    SwarmSection,
)
from subnet.swarm.roster import Roster

log = logging.getLogger("orion.scripts.sim")

NETUID: Final = 9
TEMPO: Final = 20
STAKE: Final = 10_000.0
VOCAB: Final = 64
TOKENS: Final = 40_000
PORT: Final = 8091
REPEATER: Final = "10.255.0.1"
"""Address of somebody on the way."""
MEMORY: Final = 8 << 30
RESTART_SECONDS: Final = 10.0
RESTARTS: Final = 4
"""Of a program that ended by itself, in one run."""
SHARD: Final = "tokens.bin"


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Of a simulated swarm. Times are in virtual seconds."""

    stages: int = 4
    replicas: int = 3
    joiners: int = 1
    """Miners that come later."""
    validators: int = 3
    minutes: float = 20.0
    block_time: float = 6.0
    round_blocks: int = 30
    phase_blocks: int = 4
    forward: float = 2.0
    backward: float = 4.0
    step: float = 0.2

    @property
    def nodes(self) -> int:
        return self.stages * self.replicas + self.joiners + self.validators

    @property
    def rounds(self) -> int:
        """Whole ones that fit, with what comes before the first and after the last."""
        blocks = int(self.minutes * 60 / self.block_time)
        return max(2, (blocks - 4 * self.phase_blocks - 12) // self.round_blocks)


def manifest(size: Size, entry: ShardEntry, *, activation_block: int) -> Manifest:
    """A model so small that its arithmetic costs next to nothing, with all that a large one has."""
    config = ModelConfig(
        vocab=VOCAB,
        hidden=8,
        layers=size.stages,
        heads=2,
        kv_heads=1,
        ffn=8,
        context=8,
        boundary=BoundaryConfig(form=BoundaryForm.T, width=4, rank=2),
    )
    inner = OptimizerConfig(kind="adamw", lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, warmup_steps=4, clip=1.0)
    marks = marks_of(size.rounds, size.round_blocks, size.phase_blocks, overlap=True)
    return Manifest(
        version=1,
        run=RunSection(
            name="sim",
            netuid=NETUID,
            authority=address(OWNER_HOTKEY_URI),
            activation_block=activation_block,
            seed=0,
        ),
        model=ModelSection.of(config, wire_dtype="bfloat16"),
        swarm=SwarmSection(stages=size.stages, replicas=size.replicas, gather_blocks=4, lane=4),
        data=DataSection(
            batch=1,
            sequence=config.context,
            samples_per_round=2048,
            held_out=0.05,
            validation_batches=1,
            shards=[ShardSection(name=entry.name, sha256=entry.sha256, dtype=entry.dtype)],
        ),
        optimizer=OptimizerSection.of(inner, accumulation=2, outer=MEAN),
        merge=MergeSection(codec="topk2bit", decay=DECAY, clip=2.0),
        round=marks,
        audit=AuditSection(
            slot=(marks.close + size.phase_blocks) // 2 + 1,
            grace=size.phase_blocks,
            seed_delay=4,
            windows=1.0,
            readers=2.0,
            share=0.05,
            steps=0.5,
            tolerance=0.02,
            report=2 * size.phase_blocks,
            false_convictions=1e-3,
        ),
        score=ScoreSection(rounds=3, burn=0.0, scarcity=1.1),
    )


def tokens(folder: Path) -> ShardEntry:
    """A shard of tokens, each of which mostly follows from the one before."""
    generator = np.random.default_rng(5)
    noise, drawn = generator.random(TOKENS), generator.integers(0, VOCAB, TOKENS)
    ids = np.zeros(TOKENS, dtype="<u2")
    for i in range(1, TOKENS):
        ids[i] = (int(ids[i - 1]) * 5 + 7) % VOCAB if noise[i] < 0.8 else drawn[i]
    raw = ids.tobytes()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SHARD).write_bytes(raw)
    return ShardEntry(name=SHARD, sha256=hashlib.sha256(raw).hexdigest(), dtype="uint16")


class Program(Protocol):
    """What a node does from its start to its end, computing at a pace."""

    async def __call__(self, node: Node, *, pace: Pace) -> None: ...


NO_CHEATS: Final[Mapping[str, Program]] = MappingProxyType({})


@dataclass(eq=False)
class SimNode:
    """One hotkey, its machine, and its lives."""

    name: str
    role: str
    identity: Identity
    key: bittensor_core.Keypair
    host: Host
    line: Line
    """Its host's, while nothing happens to it."""
    pace: Pace
    lag: float
    """Seconds until it knows of a new block."""
    skew: float = 0.0
    lives: list[Life] = field(default_factory=list)
    chains: list[SimChain] = field(default_factory=list)
    finished: bool = False
    """Its program has come to its end."""
    endings: list[str] = field(default_factory=list)
    """What its programs ended with, those that ended by themselves and too soon."""
    paces: list[Pace] = field(default_factory=list)
    """Of each life: what it computed."""

    opened: Node | None = None
    """What runs, or ran last."""
    leaving: Life | None = None
    """The life that was told to leave."""
    returns: bool = False
    """It is started again once it has left."""
    is_cut: bool = False

    def cut_off(self, cut: bool) -> None:
        """Whether its chain endpoint says nothing."""
        self.is_cut = cut
        for chain in self.chains:
            chain.reach(not cut)

    @property
    def running(self) -> bool:
        return bool(self.lives) and not self.lives[-1].ended and not self.finished and not self.lives[-1].over


class World:
    """Everything of one run. Create it inside the running loop."""

    def __init__(
        self, loop: SimLoop, seed: int, size: Size, folder: Path, cheats: Mapping[str, Program] = NO_CHEATS
    ) -> None:
        """`cheats` are what nodes run in place of an honest program, by name."""
        self.loop = loop
        self.cheats = cheats
        self.seed = seed
        self.size = size
        self.folder = folder
        draws = iter(np.random.SeedSequence(seed).spawn(7))
        chance = np.random.default_rng
        self.blocks = Blocks(chance(next(draws)), seed, NETUID, TEMPO, size.block_time)
        self.network = Network(loop, chance(next(draws)))
        self.generator = chance(next(draws))
        self._fault_draw = chance(next(draws))
        self.entropy = chance(next(draws))
        repeater = self.network.host(REPEATER, Line(latency=0.02))
        self.repeater = Repeater(self.network, repeater, chance(next(draws)))
        self.nodes: dict[str, SimNode] = {}
        self.loaded: LoadedManifest
        self.faults: list[Fault] = []
        self._active: list[Fault] = []
        self.wrong: list[str] = []
        """What no program may do: errors that nobody foresaw."""
        self.secrets: list[str] = []
        """All that nodes drew for themselves, hex."""
        self.said: list[str] = []
        """What they logged."""
        self._ended = asyncio.Event()

    @property
    def begin(self) -> float:
        """When the first round can have begun."""
        return 6 * self.size.block_time

    @property
    def end(self) -> float:
        """When every node that runs must have come to its end."""
        marks = self.loaded.manifest.round
        blocks = marks.count * marks.length + max(0, marks.merge - marks.length) + marks.linger
        return self.begin + (blocks + 40) * self.size.block_time * 1.1

    async def groups(self) -> list[list[str]]:
        """Names of each stage's miners, and of the validators, once round 0 has begun."""
        names = {node.identity.hotkey: node.name for node in self.nodes.values()}
        validators = [node.name for node in self.nodes.values() if node.role == "validator"]
        while (roster := self._roster()) is None:  # noqa: ASYNC110 - on a virtual clock
            await asyncio.sleep(1.0)
        return [*([names[hotkey] for hotkey in stage] for stage in roster.stages), validators]

    def _roster(self) -> Roster | None:
        opened = (node.opened for node in self.nodes.values())
        return next((node.history.newest for node in opened if node is not None and node.history.newest), None)

    def found(self) -> None:
        """Data, hotkeys, registrations and the manifest on chain."""
        size = self.size
        entry = tokens(self.folder / "data")
        miners = size.stages * size.replicas + size.joiners
        names = [("miner", i) for i in range(miners)] + [("validator", i) for i in range(size.validators)]
        for number, (role, i) in enumerate(names):
            self._add(f"{role}-{i}", role, number)
        stakes = {node.identity.hotkey: STAKE if node.role == "validator" else 0.0 for node in self.nodes.values()}
        self.blocks.found(stakes)
        activation = self.blocks.chain.head.number
        path = self.folder / "manifest.toml"
        self.loaded = manifest(size, entry, activation_block=activation).write(path)
        self.blocks.announce(Announcement(activation, self.loaded.digest).encode())

    def _add(self, name: str, role: str, number: int) -> None:
        size, chance = self.size, self.generator
        key = bittensor_core.Keypair.create_from_uri(f"//{name}", SCHEME.get())
        line = Line(latency=float(chance.uniform(0.005, 0.08)), jitter=0.005, loss=float(chance.uniform(0, 0.005)))
        fast = float(chance.uniform(0.8, 1.25))
        self.nodes[name] = SimNode(
            name=name,
            role=role,
            identity=Identity.from_uri(f"//{name}"),
            key=key,
            host=self.network.host(f"10.0.{number // 250}.{number % 250 + 1}", line),
            line=line,
            pace=Pace(size.forward * fast, size.backward * fast, size.step * fast),
            lag=float(chance.uniform(0.05, 1.0)),
        )

    # -- nodes ------------------------------------------------------------------------------------------------------

    def start(self, name: str) -> None:
        node = self.nodes[name]
        if node.running:
            return
        life = Life(f"{name}.{len(node.lives)}")
        node.lives.append(life)
        node.pace = replace(node.pace, accumulated=[], applied=[], cuts=[])
        node.paces.append(node.pace)
        self.loop.begin(life, self._live(node))

    async def _live(self, node: SimNode) -> None:
        """What `neurons.node.main` does."""
        chance = np.random.default_rng(self.entropy.integers(1 << 62))

        def entropy(count: int) -> bytes:
            drawn = chance.bytes(count)
            self.secrets.append(drawn.hex())
            return drawn

        async def connect() -> SimChain:
            chain = SimChain(self.blocks, node.key, lag=node.lag)
            chain.reach(not node.is_cut)
            node.chains = [chain]
            return chain

        around = Surroundings(
            now=lambda: EPOCH_MS / 1000 + self.loop.time() + node.skew,
            now_ns=lambda: EPOCH_MS * 1_000_000 + int((self.loop.time() + node.skew) * 1e9),
            entropy=entropy,
            free_memory=lambda: MEMORY,
            footprint=lambda: Footprint(0, 0, 0),
            sockets=self.network.sockets(node.host),
        )
        body = partial(mine, machine=machine_at(node.pace)) if node.role == "miner" else validate
        if node.name in self.cheats:
            body = partial(self.cheats[node.name], pace=node.pace)
        try:
            async with await Node.stand(
                self._config(node),
                role=node.role,
                loaded=self.loaded,
                identity=node.identity,
                connect=connect,
                around=around,
            ) as opened:
                node.opened = opened
                try:
                    await body(opened)
                except Exception as error:
                    opened.telemetry.emit(NodeFailed(message=one_line(error)))
                    raise
            node.finished = True
            if node.returns and node.leaving is node.lives[-1]:
                self._come_back(node)
        except Exception as error:
            node.endings.append(f"{type(error).__name__}: {one_line(error)}")
            log.warning("%s ended: %s", node.name, node.endings[-1], exc_info=error)
            node.lives[-1].over = True
            self._again(node)
        self._ended.set()

    def _again(self, node: SimNode) -> None:
        """What started it (systemd, Docker) starts it again."""
        self.network.kill(node.host, node.lives[-1])
        if len(node.endings) <= RESTARTS:
            self._start_later(node)

    def _start_later(self, node: SimNode) -> None:
        self.network.at(self.loop.time() + RESTART_SECONDS, partial(self._start_again, node, len(node.lives)))

    def _start_again(self, node: SimNode, lives: int) -> None:
        if len(node.lives) == lives:
            self.start(node.name)

    def uid(self, node: SimNode) -> int:
        found = self.blocks.state(self.blocks.finalized).by_hotkey(node.identity.hotkey)
        assert found is not None  # noqa: S101 - all are registered
        return found.uid

    def _config(self, node: SimNode) -> NeuronConfig:
        out = self.folder / "nodes" / node.name
        return NeuronConfig(
            network="sim",
            netuid=NETUID,
            wallet="sim",
            hotkey=node.name,
            manifest=self.folder / "manifest.toml",
            data=self.folder / "data",
            out=out,
            checkpoints=str(out),
            name=node.name,
            host=node.host.address,
            announce=node.host.address,
            port=PORT,
            device="cpu",
            threads=1,
            uplink=200e6,
            ring=64 << 20,
            evidence_disk=64 << 20,
        )

    def kill(self, name: str) -> None:
        """End its process, whatever it is doing."""
        node = self.nodes[name]
        if not node.running:
            return
        life = node.lives[-1]
        self.loop.end(life)
        self.network.kill(node.host, life)
        for chain in node.chains:
            if chain in self.blocks.views:
                self.blocks.views.remove(chain)

    def wipe(self, name: str) -> None:
        """Empty its disk, but for the log that the simulation reads."""
        out = self.folder / "nodes" / name
        for path in out.iterdir() if out.exists() else ():
            if path.is_dir() and path.name != "events":
                shutil.rmtree(path)

    def leave(self, name: str) -> None:
        """SIGUSR1."""
        node = self.nodes[name]
        if node.running and node.lives[-1].on_signal is not None:
            node.leaving, node.returns = node.lives[-1], False
            self.loop.begin(node.lives[-1], _call(node.lives[-1]))

    def _come_back(self, node: SimNode) -> None:
        """Its operator starts it again."""
        node.finished, node.lives[-1].over = False, True
        self._start_later(node)

    # -- the run ----------------------------------------------------------------------------------------------------

    async def run(self, faults: Sequence[Fault] | None) -> None:
        """From the first process to the last; `faults` are drawn from the seed unless they are given."""
        self.found()
        size, marks = self.size, self.loaded.manifest.round
        over = self.begin + marks.count * marks.length * size.block_time
        making = asyncio.create_task(self.blocks.run())
        joiners = {f"miner-{size.stages * size.replicas + i}" for i in range(size.joiners)}
        for name in self.nodes:
            latest = 0.4 * over if name in joiners else 6.0
            self.loop.call_at(float(self.generator.uniform(0, latest)), self.start, name)
        if faults is None:
            groups = await self.groups()
            newcomers = sorted(set(self.nodes).difference(*groups))
            faults = draw(self._fault_draw, groups, newcomers, begin=self.loop.time(), end=over)
        self.faults = list(faults)
        if any(fault.kind is Kind.REPEAT for fault in faults):
            self.network.tap = self.repeater
        for fault in self.faults:
            self.loop.call_at(fault.at, self._strike, fault)
            self.loop.call_at(fault.ends, self._lift, fault)
        await asyncio.sleep(6.0)
        while self.loop.time() < self.end and any(node.running or not node.lives for node in self.nodes.values()):
            try:
                async with asyncio.timeout(min(30.0, max(0.1, self.end - self.loop.time()))):
                    await self._ended.wait()
            except TimeoutError:
                continue
            self._ended.clear()
        making.cancel()

    def _strike(self, fault: Fault) -> None:
        log.info("fault: %s", fault)
        self._active.append(fault)
        for name in fault.nodes:
            match fault.kind:
                case Kind.KILL | Kind.DARK:
                    self.kill(name)
                case Kind.WIPE:
                    self.kill(name)
                    self.wipe(name)
                case Kind.PAUSE if self.nodes[name].running:
                    self.loop.pause(self.nodes[name].lives[-1])
                case Kind.LEAVE:
                    self.leave(name)
        self._settle()

    def _lift(self, fault: Fault) -> None:
        log.info("over: %s", fault)
        self._active.remove(fault)
        self._settle()
        for name in fault.nodes:
            node, held = self.nodes[name], {other.kind for other in self._active if name in other.nodes}
            if fault.kind in DOWN and not held & DOWN:
                self.start(name)
            if fault.kind is Kind.LEAVE and node.leaving is not None and node.leaving is node.lives[-1]:
                if node.finished:
                    self._come_back(node)
                else:
                    node.returns = True
            if fault.kind is Kind.PAUSE and Kind.PAUSE not in held and node.running:
                self.loop.go_on(node.lives[-1])

    def _settle(self) -> None:
        """Lines, clocks, paces and the chain are as the faults of the moment make them."""
        for node in self.nodes.values():
            self._settle_node(node, [fault for fault in self._active if node.name in fault.nodes])
        self.network.between(pair for fault in self._active for pair in self._blocked(fault))
        repeats = [fault for fault in self._active if fault.kind is Kind.REPEAT]
        self.repeater.shares = {self.nodes[name].host.address: row.amount for row in repeats for name in row.nodes}
        late = [int(fault.amount) for fault in self._active if fault.kind is Kind.LATE]
        self.blocks.stalled = any(fault.kind is Kind.STALL for fault in self._active)
        self.blocks.late = max(late, default=0)

    @staticmethod
    def _settle_node(node: SimNode, faults: Sequence[Fault]) -> None:
        line, node.skew, node.pace.times = node.line, 0.0, 1.0
        for fault in faults:
            match fault.kind:
                case Kind.SLOW:
                    node.pace.times = fault.amount
                case Kind.SKEW:
                    node.skew = fault.amount
                case Kind.LOSSY:
                    line = replace(line, loss=fault.amount)
                case Kind.NARROW:
                    line = replace(line, bandwidth=line.bandwidth * fault.amount)
                case Kind.FAR:
                    line = replace(line, latency=line.latency + fault.amount)
        kinds = {fault.kind for fault in faults}
        node.host.line, node.host.dark = line, Kind.DARK in kinds
        node.cut_off(Kind.CUT_OFF in kinds)

    def _blocked(self, fault: Fault) -> Iterator[tuple[str, str]]:
        """Pairs of addresses between which nothing passes."""
        if fault.kind not in (Kind.ISOLATE, Kind.SPLIT, Kind.MUTE, Kind.DEAF):
            return
        own = [self.nodes[name].host.address for name in fault.nodes]
        rest = [node.host.address for node in self.nodes.values() if node.name not in fault.nodes]
        for a in own:
            for b in rest:
                if fault.kind is not Kind.DEAF:
                    yield a, b
                if fault.kind is not Kind.MUTE:
                    yield b, a


async def _call(life: Life) -> None:
    if life.on_signal is not None:
        life.on_signal()


def logs(folder: Path) -> dict[str, Path]:
    """The event log of each node."""
    return {path.stem: path for path in sorted((folder / "nodes").glob("*/events/*.jsonl"))}
