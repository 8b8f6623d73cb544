"""A round that every replica has computed and closed, and miners that show it over real axons: honestly or bent.

No chain and no clock: the round is computed here, one microbatch after the other, with the real engines, and becomes
ledgers with signed receipts, window heads over real roots, and tensors. `Show.bend` stands between what a miner would
answer and what it answers.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from model.accounting import total_parameters
from model.config import BoundaryConfig, BoundaryForm
from model.engine import StageEngine
from model.layout import Layout
from model.optimizer import Kind
from model.recompute import Recompute
from model.split import split
from model.stage import build_stage, flatten
from neurons.adopting import Adopter
from neurons.auditing import Auditor
from neurons.bench import Bench
from neurons.dossier import Dossier, Entry, RoundFacts
from neurons.follower import RoundStart
from neurons.kept import Pieces, Vector
from subnet.identity import Identity
from subnet.manifest import LoadedManifest
from subnet.messages import (
    EvidenceRequest,
    EvidenceTables,
    RunSynapse,
    StatePieces,
    StateRequest,
    Tensors,
    UnitRequest,
    WeightsDelta,
    WindowRequest,
)
from subnet.swarm.codec import codec_of
from subnet.swarm.record import Phase, Record, bind_roots
from subnet.swarm.roster import Roster
from subnet.swarm.routing import hops
from subnet.transport.admission import Admission
from subnet.transport.axon import Axon, Reply
from subnet.transport.dendrite import NO_SPECS, Dendrite
from subnet.transport.errors import Dropped
from subnet.transport.synapse import Synapse, tensor_bytes
from subnet.trust import delta
from subnet.trust.audit import UnitTensors
from subnet.trust.decision import Rule, Suspicion, tests_per_year
from subnet.trust.heads import ACK_BYTES, HEAD_BYTES, Statement, WindowHead, statement_message
from subnet.trust.heads import chain as digests_of
from subnet.trust.ledger import (
    CLOSING_BYTES,
    LEAF_BYTES,
    NO_DIGEST,
    Closing,
    Direction,
    Evidence,
    Leaf,
    Ledger,
    UnitKey,
    digest,
    receipt_message,
    units_hash,
)
from subnet.trust.pool import Pool
from subnet.trust.tree import Tree
from tests.neurons.swarm import SEED, manifest, open_corpus, tiny, tokens_file

PAYLOAD = b"p" * 32
NUMBER = 3
"""The round, unless another one is asked for."""
WINDOWS_PER_SLOT = 2
NOW = time.time_ns


@dataclass
class Work:
    """What one replica has of the round."""

    identity: Identity
    engine: StageEngine
    round: int = NUMBER
    ledger: Ledger = field(default_factory=Ledger)
    units: dict[UnitKey, UnitTensors] = field(default_factory=dict)
    states: dict[tuple[int, str], torch.Tensor] = field(default_factory=dict)
    """By (version, part)."""
    vectors: dict[tuple[int, str], Vector] = field(default_factory=dict)
    heads: list[WindowHead] = field(default_factory=list)
    evidence: Evidence | None = None
    behind: bool = False
    """Whether a merge is to be taken over at the next step boundary."""
    merged: int = 0
    """Version of the window before which one was."""
    cheat: Callable[[Leaf, torch.Tensor], torch.Tensor] | None = None
    """What it sends on in place of an output, fp32."""

    @property
    def hotkey(self) -> str:
        return self.identity.hotkey

    def vector(self, version: int, part: str) -> Vector:
        """A state, hashed once."""
        return self.vectors.setdefault((version, part), Vector(self.states[version, part]))

    @property
    def record(self) -> Record:
        assert self.evidence is not None
        return Record(
            run=b"run-0001",
            round=self.round,
            phase=Phase.CUT,
            work=len(self.evidence.leaves),
            root=bind_roots(PAYLOAD, self.evidence.root),
        )


class ClosedRound:
    """`stages` x `replicas` that computed `samples` microbatches of round `number`."""

    def __init__(
        self,
        folder: Path,
        *,
        stages: int = 2,
        replicas: int = 2,
        samples: int = 24,
        cheats: Mapping[tuple[int, int], Callable[[Leaf, torch.Tensor], torch.Tensor]] | None = None,
        bent: Mapping[tuple[int, int], Callable[[StageEngine], None]] | None = None,
        engines: Mapping[tuple[int, int], Callable[..., StageEngine]] | None = None,
        windows: float = 2,
        readers: float = 8.0,
        steps: float = 0.5,
        merge: Callable[[Work, torch.Tensor], torch.Tensor] | None = None,
        number: int = NUMBER,
        kind: Kind = "adamw",
    ) -> None:
        """By (stage, replica): `cheats` change what that replica sends on, `bent` get its engine before the round;
        `engines` are built as `StageEngine` is.

        `merge` says what a replica makes of its weights when a merge comes half-way: it moves the public state.
        """
        entry = tokens_file(folder)
        config = tiny(boundary=BoundaryConfig(form=BoundaryForm.A, width=16))
        described = manifest(config, entry, stages=stages, replicas=replicas, wire="bfloat16", accumulation=2)
        rules = described.audit.model_copy(
            update={"windows": windows, "readers": readers, "share": 0.2, "steps": steps, "tolerance": 0.02}
        )
        described = described.model_copy(
            update={
                "audit": rules,
                "merge": described.merge.model_copy(update={"codec": "topk2bit"}),
                "optimizer": described.optimizer.model_copy(update={"kind": kind}),
            }
        )
        self.loaded: LoadedManifest = described.write(folder / "manifest.toml")
        self.corpus = open_corpus(folder, described, entry)
        self.plans = split(config, stages)
        self.layouts = [Layout.planned(config, plan, kind) for plan in self.plans]
        keys = [Identity.from_uri(f"//audited-{index}") for index in range(stages * replicas)]
        hotkeys = [key.hotkey for key in keys]
        roster = Roster.of([hotkeys[stage * replicas : (stage + 1) * replicas] for stage in range(stages)])
        self.number = number
        self.roster = replace(roster, round=number)
        by_hotkey = {key.hotkey: key for key in keys}
        self.works: dict[str, Work] = {}
        for stage, plan in enumerate(self.plans):
            for index, hotkey in enumerate(self.roster.stages[stage]):
                engine = (engines or {}).get((stage, index), StageEngine)(
                    build_stage(config, plan, described.run.seed),
                    described.optimizer.inner(),
                    plan,
                    n_total_params=total_parameters(config, stages),
                    accumulation=described.optimizer.accumulation,
                    recompute=Recompute.KEEP,
                    capacity=4,
                )
                work = Work(by_hotkey[hotkey], engine, number)
                work.cheat = (cheats or {}).get((stage, index))
                bend = (bent or {}).get((stage, index))
                if bend is not None:
                    bend(engine)
                self.works[hotkey] = work
        self.base = [flatten(build_stage(config, plan, described.run.seed)) for plan in self.plans]
        generator = torch.Generator().manual_seed(4)
        moved = [theta + 1e-3 * torch.randn(theta.shape, generator=generator) for theta in self.base]
        self.public = self.base if merge is None else moved
        """θ with all rounds before this one merged."""
        self._merge = merge
        for work in self.works.values():
            self._note_state(work, "weights", "optimizer")
        first = number * described.data.samples_per_round
        for sample in range(first, first + samples):
            self._microbatch(sample, first)
            for work in self.works.values():
                work.behind = merge is not None and sample >= first + samples // 2 and not work.merged
        for work in self.works.values():
            self._close(work)

    @property
    def samples(self) -> range:
        quota = self.loaded.manifest.data.samples_per_round
        return range(self.number * quota, (self.number + 1) * quota)

    def stage(self, index: int) -> list[Work]:
        return [self.works[hotkey] for hotkey in self.roster.stages[index]]

    # -- computing ------------------------------------------------------------------------------------------------

    def _microbatch(self, sample: int, first: int) -> None:
        heads = self.roster.stages[0]
        index, owner = divmod(sample - first, len(heads))
        path = [self.works[heads[owner]]]
        for stage in range(1, len(self.plans)):
            replicas, lane = self.roster.stages[stage], self.loaded.manifest.swarm.lane
            order = hops(replicas, seed=SEED, stage=stage, head=owner, heads=len(heads), index=index, lane=lane)
            path.append(self.works[order[0]])
        tokens = self.corpus.sample(sample)
        wire = torch.bfloat16
        x: torch.Tensor = tokens[:, :-1].contiguous()
        inputs = []
        for stage, work in enumerate(path[:-1]):
            inputs.append(x)
            computed = work.engine.forward(sample, x if stage == 0 else x.float())
            leaf = Leaf(
                direction=Direction.FORWARD,
                stage=stage,
                sample=sample,
                version=work.engine.version,
                source=255 if stage == 0 else self._index(path, stage - 1),
                input=digest(tensor_bytes(x)),
            )
            y = self._sent(work, leaf, computed).to(wire)
            self._enter(work, path[stage + 1], self._index(path, stage + 1), leaf, UnitTensors(x, None, y))
            x = y
        inputs.append(x)
        tail, last = path[-1], len(path) - 1
        loss, dx = tail.engine.tail(sample, x if last == 0 else x.float(), tokens[:, 1:])
        g: torch.Tensor | None = None
        for stage in reversed(range(len(path))):
            work = path[stage]
            if stage < last:
                assert g is not None
                version = work.engine.version
                dx = work.engine.backward(sample, g.float())
            else:
                version = work.engine.version
            leaf = Leaf(
                direction=Direction.BACKWARD,
                stage=stage,
                sample=sample,
                version=version,
                source=self._index(path, stage + 1) if stage < last else self._index(path, stage - 1),
                loss=loss,
                input=digest(tensor_bytes(inputs[stage])),
                gradient=NO_DIGEST if g is None else digest(tensor_bytes(g)),
            )
            sent = None if dx is None else self._sent(work, leaf, dx).to(wire)
            consumer = path[stage - 1] if stage else None
            index = self._index(path, stage - 1) if stage else 255
            self._enter(work, consumer, index, leaf, UnitTensors(inputs[stage], g, sent))
            self._maybe_step(work)
            g = sent

    def _index(self, path: list[Work], stage: int) -> int:
        return self.roster.stages[stage].index(path[stage].hotkey)

    def _sent(self, work: Work, leaf: Leaf, computed: torch.Tensor) -> torch.Tensor:
        return computed if work.cheat is None else work.cheat(leaf, computed)

    def _enter(self, work: Work, consumer: Work | None, sink: int, leaf: Leaf, unit: UnitTensors) -> None:
        leaf = replace(leaf, output=NO_DIGEST if unit.output is None else digest(tensor_bytes(unit.output)))
        work.ledger.add(leaf)
        work.units[leaf.key] = unit
        if consumer is not None:
            message = receipt_message(
                self.loaded.run_id,
                self.number,
                producer=work.hotkey,
                key=leaf.key,
                stage=leaf.stage,
                output=leaf.output,
            )
            work.ledger.receipt(leaf.key, sink=sink, signature=consumer.identity.sign(message))

    def _maybe_step(self, work: Work) -> None:
        if work.engine.units_accumulated < self.loaded.manifest.optimizer.accumulation:
            return
        version, steps = work.engine.version, work.engine.steps
        work.engine.step()
        self._note_state(work, "next_weights", "next_optimizer", version=version)
        self._head(work, version, steps)
        if work.behind:
            assert self._merge is not None
            work.behind, work.merged = False, work.engine.version
            work.states[work.merged, "previous_weights"] = flatten(work.engine.stage)
            work.engine.replace_weights(self._merge(work, flatten(work.engine.stage)))
        self._note_state(work, "weights", "optimizer")

    def _note_state(self, work: Work, weights: str, optimizer: str, *, version: int | None = None) -> None:
        at = work.engine.version if version is None else version
        work.states[at, weights] = flatten(work.engine.stage)
        work.states[at, optimizer] = work.engine.moments()

    def _head(self, work: Work, version: int, steps: int) -> None:
        leaves = work.ledger.window(version)
        backward = sum(leaf.direction is Direction.BACKWARD for leaf in leaves)
        roots = {
            part: work.vector(version, part).tree().root
            for part in ("weights", "optimizer", "next_weights", "next_optimizer")
        }
        head = WindowHead(
            version=version,
            steps=steps,
            slot=len(work.heads) // WINDOWS_PER_SLOT,
            forward=len(leaves) - backward,
            backward=backward,
            merged=self.number if work.merged and work.merged == version else 0,
            units=units_hash(leaves),
            **roots,
        )
        work.heads.append(head)
        work.ledger.close_window(head)

    def _close(self, work: Work) -> None:
        """End the round as an engine does: a last step for what is accumulated, or a window without one."""
        version = work.engine.version
        if work.engine.units_accumulated:
            steps = work.engine.steps
            work.engine.step()
            self._note_state(work, "next_weights", "next_optimizer", version=version)
            self._head(work, version, steps)
        elif work.ledger.window(version):
            self._note_state(work, "next_weights", "next_optimizer")
            self._head(work, version, work.engine.steps)
        weights = Tree.of(tensor_bytes(flatten(work.engine.stage))).root
        work.evidence = work.ledger.close(Closing(weights, NO_DIGEST, NO_DIGEST))

    # -- what everybody knows -------------------------------------------------------------------------------------

    @property
    def slots(self) -> int:
        return max(head.slot for work in self.works.values() for head in work.heads) + 1

    def seed(self, slot: int) -> bytes:
        return digest(b"slot %d" % slot)

    def pool(self, work: Work, head: WindowHead) -> Pool:
        return Pool.of(work.engine.layout, seed=self.seed(head.slot), hotkey=work.hotkey, version=head.version)

    def facts(self, secret: bytes, *, stake_share: float = 1.0) -> RoundFacts:
        public, base = dict(enumerate(self.public)), dict(enumerate(self.base))
        start = RoundStart(
            self.roster, public, base, {}, self.roster.members, codec_of(self.loaded.manifest.merge.codec)
        )
        return RoundFacts(
            roster=self.roster,
            records={hotkey: work.record for hotkey, work in self.works.items()},
            start=start,
            seeds=[self.seed(slot) for slot in range(self.slots)],
            secret=secret,
            stake_share=stake_share,
            statements={},
        )

    def statement(self, work: Work, count: int) -> Statement:
        """What an honest miner signed after so many windows."""
        digest_ = digests_of(work.heads)[count]
        message = statement_message(self.loaded.run_id, self.number, hotkey=work.hotkey, count=count, digest=digest_)
        return Statement(count, digest_, work.identity.sign(message))


Bend = Callable[[RunSynapse, Synapse, dict[str, torch.Tensor]], Awaitable[Reply]]


async def honest(_: RunSynapse, reply: Synapse, tensors: dict[str, torch.Tensor]) -> Reply:
    return reply, tensors


class Show:
    """Serves one replica's round."""

    def __init__(self, closed: ClosedRound, work: Work, *, bend: Bend = honest) -> None:
        self.closed, self.work, self.bend = closed, work, bend
        self.asked: list[RunSynapse] = []
        self.axon = Axon(Admission(work.hotkey, allow=lambda _hotkey, _route: None, now_ns=NOW))
        self.axon.serve(EvidenceRequest, self.tables, specs=NO_SPECS)
        self.axon.serve(WindowRequest, self.window, specs=NO_SPECS)
        self.axon.serve(UnitRequest, self.unit, specs=NO_SPECS)
        self.axon.serve(StateRequest, self.state, specs=NO_SPECS)

    async def _answer(self, request: RunSynapse, reply: Synapse, tensors: dict[str, torch.Tensor]) -> Reply:
        self.asked.append(request)
        if (request.run, request.round) != (self.closed.loaded.run_id.hex(), self.closed.number):
            raise Dropped(f"round {request.round} is not shown here", "ask for the one that is")
        return await self.bend(request, reply, tensors)

    async def tables(self, _: str, request: EvidenceRequest, _tensors: Mapping[str, torch.Tensor]) -> Reply:
        assert self.work.evidence is not None
        tables = self.work.evidence.tables()
        reply = EvidenceTables(
            payload=PAYLOAD.hex(), heads=len(self.work.evidence.heads), acks=len(self.work.evidence.acks)
        )
        return await self._answer(
            request,
            reply,
            {
                "leaves": rows(tables.leaves, LEAF_BYTES),
                "heads": rows(tables.heads, HEAD_BYTES),
                "acks": rows(tables.acks, ACK_BYTES),
                "closing": rows(tables.closing, CLOSING_BYTES),
            },
        )

    async def window(self, _: str, request: WindowRequest, _tensors: Mapping[str, torch.Tensor]) -> Reply:
        theta = self.work.states[request.version, "weights"]
        data = delta.encode(theta, self.closed.public[self.work.engine.plan.index])
        return await self._answer(request, WeightsDelta(size=len(data)), {"delta": rows(data, len(data))})

    async def unit(self, _: str, request: UnitRequest, _tensors: Mapping[str, torch.Tensor]) -> Reply:
        direction = Direction.BACKWARD if request.backward else Direction.FORWARD
        unit = self.work.units[UnitKey(request.sample, direction)]
        tensors = {"input": unit.input, "gradient": unit.gradient, "output": unit.output}
        present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        return await self._answer(request, Tensors(), present)

    async def state(self, _: str, request: StateRequest, _tensors: Mapping[str, torch.Tensor]) -> Reply:
        data, proofs = [], []
        head = next(head for head in self.work.heads if head.version == request.version)
        pool = self.closed.pool(self.work, head)
        for part, index in zip(request.parts, request.pieces, strict=True):
            named = pool.moments if part in ("optimizer", "next_optimizer") else pool.weights
            pieces = Pieces.of(self.work.vector(request.version, part), named)
            data.append(pieces.piece(index))
            proofs.append(pieces.proof(index))
        reply = StatePieces(sizes=[piece.numel() for piece in data], hashes=[len(proof) for proof in proofs])
        hashes = rows(b"".join(chain.from_iterable(proofs)), 32)
        return await self._answer(request, reply, {"data": torch.cat(data, dim=1), "proof": hashes})


def rows(data: bytes, width: int) -> torch.Tensor:
    if not data:
        return torch.empty(0, width, dtype=torch.uint8)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(-1, width)


async def no_shards(_number: int, _stage: int, _shard: int) -> tuple[str, ...]:
    return ()


class Judging:
    """One validator: its auditor, its suspicions, and what it found."""

    def __init__(self, closed: ClosedRound, name: str, endpoints: Mapping[str, str], *, patience: float) -> None:
        self.identity = Identity.from_uri(f"//judging-{name}")
        self.endpoints = endpoints
        manifest_ = closed.loaded.manifest
        self.rule = Rule.of(
            tests_per_year=tests_per_year(windows=6, round_seconds=1200, validators=4),
            false_convictions=manifest_.audit.false_convictions,
            rounds=manifest_.score.rounds,
        )
        self.held: dict[str, Suspicion] = {}
        self.entries: list[Entry] = []
        self.dendrite = Dendrite(self.identity, now_ns=NOW)
        self.bench = Bench([build_stage(manifest_.model.config(), plan, 1) for plan in closed.plans])
        self.auditor = Auditor(
            loaded=closed.loaded,
            plans=closed.plans,
            layouts=closed.layouts,
            corpus=closed.corpus,
            bench=self.bench,
            dendrite=self.dendrite,
            endpoint=endpoints.get,
            tolerance=lambda _: lambda _check: manifest_.audit.tolerance,
            enter=self.enter,
            held=self.of,
            risk=lambda _: 1.0,
            rule=lambda: self.rule,
            patience=patience,
        )

        self.adopter = Adopter(self.auditor, run=closed.loaded.run_id, recheck=no_shards)

    def of(self, hotkey: str) -> Suspicion:
        return self.held.get(hotkey, Suspicion()).at(NUMBER, self.rule)

    def enter(self, entry: Entry) -> None:
        self.entries.append(entry)
        self.held[entry.finding.hotkey] = self.of(entry.finding.hotkey).after(entry.finding, self.rule)

    def failed(self, hotkey: str | None = None) -> list[Entry]:
        return [entry for entry in self.entries if not entry.finding.passed and hotkey in (None, entry.finding.hotkey)]

    async def audit(self, facts: RoundFacts) -> dict[str, Dossier]:
        dossiers = self.auditor.open(facts)
        await self.auditor.audit(facts, dossiers)
        return dossiers


class Court:
    """`async with Court(closed, bends=…)`: every replica shows its round; validators by name."""

    def __init__(
        self,
        closed: ClosedRound,
        *,
        bends: Mapping[str, Bend] | None = None,
        validators: tuple[str, ...] = ("one",),
        patience: float = 2.0,
    ) -> None:
        self.closed = closed
        self.shows = {
            hotkey: Show(closed, work, bend=(bends or {}).get(hotkey, honest)) for hotkey, work in closed.works.items()
        }
        self.endpoints: dict[str, str] = {}
        self.validators = {name: Judging(closed, name, self.endpoints, patience=patience) for name in validators}
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        for hotkey, show in self.shows.items():
            await show.axon.start()
            self._stack.push_async_callback(show.axon.stop)
            self.endpoints[hotkey] = show.axon.endpoint
        for validator in self.validators.values():
            await self._stack.enter_async_context(validator.dendrite)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()
