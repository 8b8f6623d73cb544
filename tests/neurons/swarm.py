"""A swarm of stage workers in one process: real keys, axons, dendrites and compute threads, no chain."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from model.accounting import total_parameters
from model.config import BoundaryConfig, BoundaryForm, ModelConfig
from model.data import Corpus, ShardEntry
from model.engine import StageEngine
from model.layout import Layout, Place
from model.recompute import Recompute
from model.split import split
from model.stage import build_stage
from neurons.archive import Archive, RoundArchive
from neurons.pipeline import StageWorker
from neurons.telemetry import Stamped, Telemetry, read_events
from subnet.identity import Identity
from subnet.manifest import (
    AuditSection,
    DataSection,
    LoadedManifest,
    Manifest,
    MergeSection,
    ModelSection,
    OptimizerSection,
    RoundSection,
    RunSection,
    ScoreSection,
    ShardSection,
    SwarmSection,
)
from subnet.messages import Backward, Forward, HolderRequest, InputRequest, Notice, Shapes
from subnet.swarm.roster import Roster
from subnet.transport.admission import Admission
from subnet.transport.axon import Axon
from subnet.transport.dendrite import Dendrite
from subnet.trust.audit import UnitTensors

SEED = b"a public seed"


def tiny(*, boundary: BoundaryConfig | None = None) -> ModelConfig:
    return ModelConfig(
        vocab=512,
        hidden=64,
        layers=4,
        heads=4,
        kv_heads=2,
        ffn=96,
        context=32,
        boundary=boundary or BoundaryConfig(form=BoundaryForm.NONE, width=0),
    )


def tokens_file(folder: Path, *, count: int = 40_000) -> ShardEntry:
    """Learnable tokens: each follows from the one before, with noise."""
    import hashlib

    generator = np.random.default_rng(5)
    ids = np.zeros(count, dtype="<u2")
    noise = generator.random(count)
    draws = generator.integers(0, 512, count)
    for i in range(1, count):
        ids[i] = (int(ids[i - 1]) * 5 + 7) % 512 if noise[i] < 0.8 else draws[i]
    raw = ids.tobytes()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokens.bin").write_bytes(raw)
    return ShardEntry(name="tokens.bin", sha256=hashlib.sha256(raw).hexdigest(), dtype="uint16")


def one_vector(values: int) -> Layout:
    """Of a stage that is one vector of so many values, each with both moments."""
    return Layout((Place("w", (values,), start=0, second=0, adaptive=True),))


def manifest(
    config: ModelConfig,
    entry: ShardEntry,
    *,
    stages: int,
    replicas: int = 1,
    wire: str = "float32",
    accumulation: int = 4,
) -> Manifest:
    return Manifest(
        version=1,
        run=RunSection(name="test", netuid=9, authority="5" + "C" * 47, activation_block=0, seed=11),
        model=ModelSection.of(config, wire_dtype=wire),
        swarm=SwarmSection(stages=stages, replicas=replicas, gather_blocks=1, lane=1),
        data=DataSection(
            batch=4,
            sequence=config.context,
            samples_per_round=4096,
            held_out=0.05,
            validation_batches=2,
            shards=[ShardSection(name=entry.name, sha256=entry.sha256, dtype="uint16")],
        ),
        optimizer=OptimizerSection(
            kind="adamw",
            lr=2e-3,
            beta1=0.9,
            beta2=0.95,
            eps=1e-8,
            weight_decay=0.1,
            warmup_steps=4,
            schedule="constant",
            steps=0,
            cooldown=0.2,
            floor=0.0,
            clip=0.0,
            accumulation=accumulation,
            outer_lr=1.0,
            outer_momentum=0.0,
        ),
        merge=MergeSection(codec="bf16", decay=0.95, clip=2.0),
        round=RoundSection(count=1, close=11, cut=12, have=13, merge=14, length=14, linger=1),
        audit=AuditSection(
            slot=8,
            grace=1,
            seed_delay=1,
            windows=1.0,
            readers=8.0,
            share=0.1,
            steps=0.5,
            tolerance=1e-4,
            report=4,
            false_convictions=1e-3,
        ),
        score=ScoreSection(rounds=3, burn=0.0, scarcity=1.1),
    )


class Member:
    """One replica: its keys, axon, dendrite and worker."""

    def __init__(self, name: str) -> None:
        self.identity = Identity.from_uri(f"//{name}")
        self.log = io.StringIO()
        self.telemetry = Telemetry(self.log, now=time.time)
        self.worker: StageWorker
        self.axon: Axon
        self.dendrite: Dendrite
        self.archive = Archive()

    @property
    def events(self) -> list[Stamped]:
        return list(read_events(self.log.getvalue().splitlines()))


class Swarm:
    """`async with Swarm(...)`: stages x replicas workers that have begun round 0 of one roster."""

    def __init__(self, loaded: LoadedManifest, corpus: Corpus, *, replicas: int = 1, synchronous: bool = False) -> None:
        self.loaded, self.corpus = loaded, corpus
        stages = loaded.manifest.swarm.stages
        self.members = {
            member.identity.hotkey: member
            for member in (Member(f"miner-{stage}-{replica}") for stage in range(stages) for replica in range(replicas))
        }
        hotkeys = list(self.members)
        self.roster = Roster.of([hotkeys[s * replicas : (s + 1) * replicas] for s in range(stages)])
        self.endpoints: dict[str, str] = {}
        self.rounds: dict[str, RoundArchive] = {}
        self.workers: dict[str, type[StageWorker]] = {}
        """Other workers than the real one, by hotkey."""
        self._synchronous = synchronous
        self._stack = AsyncExitStack()

    def stage(self, index: int) -> list[Member]:
        return [self.members[hotkey] for hotkey in self.roster.stages[index]]

    def units(self, member: Member) -> Iterator[UnitTensors]:
        """What a member has kept of its units, in the order in which they were computed."""
        for window in self.rounds[member.identity.hotkey].windows.values():
            yield from window.units.values()

    async def __aenter__(self) -> Self:
        for hotkey, member in self.members.items():
            await self._start(hotkey, member)
        return self

    async def _start(self, hotkey: str, member: Member) -> None:
        manifest = self.loaded.manifest
        config = manifest.model.config()
        plans = split(config, manifest.swarm.stages)
        plan = plans[self.roster.stage_of(hotkey)]
        member.dendrite = Dendrite(member.identity, now_ns=time.time_ns)
        await self._stack.enter_async_context(member.dendrite)
        engine = StageEngine(
            build_stage(config, plan, manifest.run.seed),
            manifest.optimizer.inner(),
            plan,
            n_total_params=total_parameters(config, plan.count),
            accumulation=manifest.optimizer.accumulation,
            recompute=Recompute.KEEP,
            capacity=32,
        )
        member.worker = self.workers.get(hotkey, StageWorker)(
            identity=member.identity,
            loaded=self.loaded,
            engine=engine,
            corpus=self.corpus,
            dendrite=member.dendrite,
            endpoint_of=self.endpoints.get,
            telemetry=member.telemetry,
            synchronous=self._synchronous,
        )
        self._stack.callback(member.worker.shut_down)
        member.axon = Axon(Admission(hotkey, allow=lambda _hotkey, _route: None, now_ns=time.time_ns))
        shapes = Shapes.of(manifest)
        member.axon.serve(Forward, member.worker.on_forward, specs={"y": shapes.boundary})
        member.axon.serve(Backward, member.worker.on_backward, specs={"g": shapes.boundary})
        member.axon.serve(HolderRequest, member.worker.on_holder, specs={})
        member.axon.serve(InputRequest, member.worker.on_input, specs={})
        member.axon.serve(Notice, member.worker.on_notice, specs={})
        await member.axon.start()
        self._stack.push_async_callback(member.axon.stop)
        self.endpoints[hotkey] = member.axon.endpoint
        held = member.archive.open(0)
        self.rounds[hotkey] = held
        member.worker.begin(0, self.roster, SEED, held)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()


def open_corpus(folder: Path, loaded: Manifest, entry: ShardEntry) -> Corpus:
    return Corpus.open(
        folder,
        [entry],
        seed=loaded.run.seed,
        batch=loaded.data.batch,
        tokens=loaded.data.sequence,
        vocab=loaded.model.vocab,
        held_out=loaded.data.held_out,
    )
