"""The round machine of a miner: train, cut, merge with the chain as coordinator, and train on meanwhile.

Blocks of a round are deadlines (manifest `[round]`). At `close` every stage takes its last step and cuts: its payload
is fixed and its weights are re-based on public state. Then CUT (roots on chain), HAVE (bitmaps on chain) and MERGE.
With `merge` beyond `length` these lie in the next round, which trains meanwhile; the merged state is taken over at a
step boundary. What happens to those who miss a deadline is defined: no root at CUT, no part in the merge; a payload
that too few hold is left out and its replica owes it again; a replica that lacks what was merged takes the public
state from a sibling, checked against the digest on chain.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from model.accounting import total_parameters
from model.engine import StageEngine
from model.relief import Holding
from model.stage import build_stage, flatten, unflatten
from neurons.archive import Archive, RoundArchive
from neurons.download import forget
from neurons.exchange import Desk
from neurons.journal import Journal
from neurons.keeper import Keeper, KeptCut
from neurons.kept import Vector
from neurons.library import Library
from neurons.machine import card
from neurons.merging import merge
from neurons.needs import fitted
from neurons.node import CHAIN_STALL, Node
from neurons.pipeline import StageWorker
from neurons.replica import Replica
from neurons.ring import capacity_of
from neurons.slots import keep_picked
from neurons.states import after_merge, said_beyond
from neurons.telemetry import CheckpointWritten, EvidenceHeld, MergeFault, RoundStarted, StageFitted, Traffic
from neurons.telemetry import Merged as MergedEvent
from neurons.terms import Marks, Outcome, Terms
from neurons.wire import DendriteExchange
from subnet.chain import ChainError
from subnet.quantities import written
from subnet.swarm.butterfly import ButterflyError
from subnet.swarm.codec import DeltaError, Feedback, codec_of, no_residual, reach
from subnet.swarm.merge import Merged
from subnet.swarm.record import Phase, Record
from subnet.swarm.roster import NO_WEIGHTS, Roster, records_of
from subnet.trust.ledger import Evidence
from subnet.trust.quota import Sizes

log = logging.getLogger("orion.neurons.rounds")

WEIGHTS = "weights."
"""Prefix of the weights in an engine's state; they follow from the public state and the contribution."""
PACE_BLOCKS = 10
STEP_BOUND = 8.0
"""An Adam-like step moves a weight by about its rate, a Muon step by at most 1.6 of it (nano); a payload that claims
this many times more is refused."""
MARGIN = 3
"""Blocks before a mark at which its record is handed to the chain: inclusion and finality take two or three. Where a
phase is long, a third of it: then blocks are short and what takes time is the machine."""


SEED_PAUSE = 5.0
"""Seconds until the chain is asked again for a slot's seed."""
PATIENCE_BLOCKS = 10
"""Blocks after a merge's end within which siblings must say that they have its result."""


class BehindError(Exception):
    """This replica lacks the public state it would have to go on from: one line that says which."""


class ChainBoard:
    """`Board` of a merge over the node's chain."""

    def __init__(self, node: Node) -> None:
        self._node = node

    async def publish(self, record: Record, *, until: int) -> None:
        await self._node.publish(record, until=until)

    async def records_at(self, block: int) -> Mapping[str, Record | None]:
        return records_of(await self._node.state(block))

    async def wait(self, block: int) -> None:
        await self._node.wait(block)

    async def seed(self, block: int) -> bytes:
        return await self._node.seed(block, "orion/pairs/1")


def merge_terms(node: Node, roster: Roster, stage: int, *, secret: bytes, end: int | None = None) -> Terms:
    """What the merge of `roster`'s round is played by at a stage; `end` is the last block to get its result by."""
    manifest = node.loaded.manifest
    marks, codec = manifest.round, codec_of(manifest.merge.codec)
    optimizer, stretch = manifest.optimizer, reach(codec, manifest.merge.decay)

    def limit(work: int) -> float:
        return stretch * STEP_BOUND * optimizer.lr * (1 + work / optimizer.accumulation)

    after, phase = roster.block + marks.merge, marks.merge - marks.have
    return Terms(
        number=roster.round,
        replicas=roster.stages[stage],
        count=node.parameters[stage],
        marks=Marks(
            cut=roster.block + marks.cut,
            have=roster.block + marks.have,
            # In an all-gather no record is read there: it is only the time by which all payloads must be here.
            merge=max(after, end or 0) if codec.error_feedback else after,
            end=max(after + (marks.merge - marks.have), end or 0),
            margin=min(max(MARGIN, phase // 3), phase // 2),
        ),
        codec=codec,
        outer=optimizer.outer(),
        limit=limit,
        clip=manifest.merge.clip,
        secret=secret,
    )


class RoundMachine:
    """One replica of one stage, round after round: `worker` trains, `replica` is what it holds in between."""

    def __init__(self, node: Node, stage: int, *, archive: Archive, library: Library, keeper: Keeper) -> None:
        self._node = node
        self._manifest = node.loaded.manifest
        self._archive = archive
        self._library = library
        self._keeper = keeper
        self.codec = codec_of(self._manifest.merge.codec)
        self.stage = stage
        self.worker = self._build()
        theta = flatten(self.engine.stage)
        momentum = torch.empty(0) if self.codec.error_feedback else torch.zeros_like(theta)
        feedback = no_residual(self.codec, theta.numel(), self._manifest.merge.decay)
        self.replica = Replica(Merged(theta, momentum), 0, feedback)
        self.digest = NO_WEIGHTS
        """Of the public state held; zero until `serve` has been called."""
        self._merges: dict[int, asyncio.Task[None]] = {}
        self._voting: set[int] = set()
        """Rounds in whose merge this replica has a say."""
        self._announcing: asyncio.Task[int | None] | None = None
        self._kept: KeptCut | None = None
        self._picking: set[asyncio.Task[None]] = set()
        """One a round: windows that no seed picks are dropped, until its last slot's seed is known."""
        self._sizes = Sizes.of(node.plans[stage], node.layouts[stage], node.shapes)
        self._secret = node.around.entropy(32)

    def _build(self) -> StageWorker:
        return build_worker(self._node, self.stage)

    @property
    def engine(self) -> StageEngine:
        return self.worker.engine

    @property
    def overlapped(self) -> bool:
        return self._manifest.round.overlapped

    @property
    def state_record(self) -> Record:
        """What this node says between merges: which public state it holds."""
        return Record(run=self._node.loaded.run_id, round=self.replica.held, phase=Phase.READY, weights=self.digest)

    def base_of(self, roster: Roster) -> int:
        """How many rounds are merged into the state that a replica of this round trains from."""
        return max(0, roster.round - self.overlapped)

    def ready_for(self, roster: Roster) -> bool:
        """Whether the public state held is the one that a replica of this round trains from."""
        return self.replica.held >= self.base_of(roster)

    async def serve(self) -> None:
        """Offer the public state held to others, and know its digest."""
        self.digest = await self._library.put(self.replica.held, self.replica.public)

    def adopt(self, public: Merged, held: int) -> None:
        """Go on from a public state that came from elsewhere."""
        self.replica.replaced(public, held)
        self.engine.replace_weights(public.theta)

    async def renumber(self, held: int) -> None:
        """Go on with the public state held as the one after `held` rounds: the merges in between were void."""
        if self.replica.pending is not None:
            await self.worker.change_weights(self.replica.merged(self.replica.public, ()), held=held)
        self.replica.held = held
        await self.serve()

    def restore(self, cut: KeptCut) -> None:
        """Go on from what was written down at a cut, as far as it belongs to the public state held."""
        if self.replica.held - 1 <= cut.round <= self.replica.held:  # an older residual is partly merged by now
            self.replica.feedback = Feedback(cut.residual, self.replica.feedback.decay)
        if cut.round == self.replica.held:
            self.replica.cut(cut.round, cut.sent, self.replica.feedback)
            self._kept = cut
        weights = unflatten(self.engine.stage, self.replica.base)
        self.engine.load_state({**cut.optimizer, **{WEIGHTS + name: tensor for name, tensor in weights.items()}})

    @property
    def parameter_names(self) -> list[str]:
        """In the order of the flat vectors."""
        return sorted(name for name, _ in self.engine.stage.named_parameters())

    # -- a round ------------------------------------------------------------------------------------------------------

    async def play(self, roster: Roster) -> None:
        """Train the round and put its contribution into the merge, which may go on afterwards.

        Raises `BehindError` if the merge before did not bring the state that this round's cut is taken from.
        """
        number = roster.round
        self._node.telemetry.emit(
            RoundStarted(
                round=number,
                block=roster.block,
                stage=self.stage,
                replicas=[len(stage) for stage in roster.stages],
                roster=roster.digest.hex(),
            )
        )
        before = self._node.history.roster(number - 1)
        if self.overlapped and before is not None and self.replica.held == number - 1:
            self.watch(before)
        if number - 1 not in self._voting:  # else the records of that merge are this round's sign of life
            self._announcing = asyncio.create_task(self._node.publish(self.state_record))
        evidence = await self._train(roster)
        await self.settle(number - 1)
        if self.replica.held != number:
            raise BehindError(f"stage {self.stage} needs the state after {number} rounds, has {self.replica.held}")
        await self._cut(roster, evidence)
        if not self.overlapped:
            await self.settle(number)

    async def _train(self, roster: Roster) -> Evidence:
        node, close = self._node, roster.block + self._manifest.round.close
        seed = await node.seed(roster.block, "orion/route/1")
        journal = Journal(node, roster, self.stage)
        held = self._archive.open(roster.round)
        self.worker.begin(roster.round, roster, seed, held, journal)
        self._pick(roster, held, journal.slot)
        following = asyncio.create_task(journal.run())
        drive = None
        if self.worker.plan.is_first:
            self.worker.closes(await self._time_of(close))
            drive = asyncio.gather(self.worker.drive(), self._foretell(close))
        try:
            await self.worker.shortage.until(node.wait(close))
        finally:
            self.worker.stop()
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
            if drive is not None:
                await drive
        _, evidence = await self.worker.close()
        return replace(evidence, acks=await journal.settle())

    def _pick(self, roster: Roster, held: RoundArchive, slot: Callable[[], int]) -> None:
        picking = asyncio.create_task(self._keep_picked(roster, held, slot))
        self._picking.add(picking)
        picking.add_done_callback(self._picking.discard)

    async def _keep_picked(self, roster: Roster, held: RoundArchive, slot: Callable[[], int]) -> None:
        """Until the round is forgotten: without the seeds nothing of it may be shown."""
        while self._archive.get(roster.round) is held:
            try:
                await keep_picked(self._node, roster, held, self._node.layouts[self.stage], self._sizes, slot)
            except ChainError as error:
                log.warning("round %d: seeds of slots cannot be read: %s", roster.round, error)
                await asyncio.sleep(SEED_PAUSE)
            else:
                return

    async def _foretell(self, close: int) -> None:
        """Judge anew when the round closes whenever half of the blocks until then have passed: their pace varies."""
        try:
            while (left := close - (await self._node.chain.finalized()).number) > 1:
                await self._node.wait(close - left // 2)
                self.worker.closes(await self._time_of(close))
        except ChainError as error:
            log.warning("when the round closes is not judged anew: %s", error)

    async def _time_of(self, block: int) -> float:
        """When `block` may be finalized, by the loop's clock, at the pace of the last blocks and one of them sooner."""
        chain = self._node.chain
        head = await chain.finalized()
        before = await chain.wait_for_block(max(1, head.number - PACE_BLOCKS), timeout=CHAIN_STALL)
        pace = (head.timestamp_ms - before.timestamp_ms) / 1000 / max(1, head.number - before.number)
        return asyncio.get_running_loop().time() + (block - head.number - 1) * pace

    async def _cut(self, roster: Roster, evidence: Evidence) -> None:
        """Fix this replica's contribution, re-base its weights on public state, and start the merge."""
        held = self._archive.open(roster.round)
        terms = self._terms(roster)
        delta = self.replica.pseudo_gradient(flatten(self.engine.stage))
        try:
            pieces, sent, feedback = await asyncio.to_thread(terms.contribution, delta, self.replica.feedback)
        except DeltaError as error:
            log.error("round %d: %s", roster.round, error)  # noqa: TRY400 - the line is for a person
            self.engine.replace_weights(self.replica.base)
            self.watch(roster)
            await self._node.publish(self.state_record)
            return
        if feedback.residual.numel():
            owed, still = Vector(self.replica.feedback.residual), Vector(feedback.residual)
            held.keep_cut(replace(held.cut, owed=owed, still_owed=still))
            roots = await asyncio.gather(asyncio.to_thread(owed.tree), asyncio.to_thread(still.tree))
            closing = replace(evidence.closing, owed=roots[0].root, still_owed=roots[1].root)
            evidence = replace(evidence, closing=closing)
        self.engine.replace_weights(self.replica.cut(roster.round, sent, feedback))
        held.evidence, held.desk = evidence, Desk(self._node.identity.hotkey, pieces, evidence=evidence.root)
        self._archive.cut_is_whole(roster.round)
        optimizer = {name: tensor for name, tensor in self.engine.state().items() if not name.startswith(WEIGHTS)}
        config, archive = self._node.config, self._archive
        self._node.telemetry.emit(
            EvidenceHeld(
                round=roster.round,
                bytes=archive.bytes,
                ring=config.ring,
                bytes_on_disk=archive.bytes_on_disk,
                disk=config.evidence_disk,
            )
        )
        await self._keeper.keep_cut(self.stage, roster.round, self.replica, pieces, evidence, optimizer)
        record = replace(self.state_record, round=roster.round, work=len(evidence.leaves))
        self._voting = {roster.round}
        self._merges[roster.round] = asyncio.create_task(self._merge(roster, terms, held.desk, record))

    def _terms(self, roster: Roster, *, end: int | None = None) -> Terms:
        return merge_terms(self._node, roster, self.stage, secret=self._secret, end=end)

    # -- merges -------------------------------------------------------------------------------------------------------

    def watch(self, roster: Roster, *, end: int | None = None) -> None:
        """Follow the merge of `roster`'s round without a say in it, unless it is being followed.

        `end` gives a merge that is past its marks time up to that block.
        """
        if roster.round in self._merges:
            return
        held = self._archive.open(roster.round)
        held.desk = held.desk or Desk(self._node.identity.hotkey)
        terms = self._terms(roster, end=end)
        self._merges[roster.round] = asyncio.create_task(self._merge(roster, terms, held.desk, None))

    @property
    def kept_round(self) -> int | None:
        """The round to whose merge this replica had cut before it was restarted, until that goes on."""
        return None if self._kept is None else self._kept.round

    def resume_merge(self, roster: Roster, block: int) -> None:
        """Go on with the contribution from before a restart, at `block`: with a say while there is time to vote."""
        cut, self._kept = self._kept, None
        if cut is None or self.replica.pending is None or self.replica.pending.round != roster.round:
            return
        terms = self._terms(roster)
        desk = self.answer_for(roster, cut)
        if block < terms.marks.have - terms.marks.margin:
            record = replace(self.state_record, round=roster.round, work=len(cut.evidence.leaves))
            self._voting = {roster.round}
            self._merges[roster.round] = asyncio.create_task(self._merge(roster, terms, desk, record))
        else:
            self.watch(roster, end=block + terms.marks.merge - terms.marks.have)

    def answer_for(self, roster: Roster, cut: KeptCut) -> Desk:
        """Show again, after a restart, what is left of the round that was cut before it."""
        held = self._archive.open(roster.round)
        held.restore(cut.evidence)
        held.desk = Desk(self._node.identity.hotkey, cut.pieces, evidence=cut.evidence.root)
        self._pick(roster, held, lambda: 0)
        return held.desk

    def forget(self, number: int) -> None:
        """A merge that brought nothing may be tried again."""
        self._merges.pop(number, None)

    async def settle(self, number: int) -> None:
        """Wait until the merge of round `number`, if there is one, has been taken over."""
        task = self._merges.get(number)
        if task is not None:
            await task
        for old in [key for key in self._merges if key < number]:
            del self._merges[old]

    async def settle_all(self) -> None:
        for task in list(self._merges.values()):
            await task

    async def _merge(self, roster: Roster, terms: Terms, desk: Desk, record: Record | None) -> None:
        """One round's merge, from its cut to the weights. What cannot be ended leaves the state as it was."""
        try:
            await self._play_merge(roster, terms, desk, record)
        except (ChainError, ButterflyError) as error:
            log.warning("round %d: the merge of stage %d broke off: %s", roster.round, self.stage, error)

    async def _play_merge(self, roster: Roster, terms: Terms, desk: Desk, record: Record | None) -> None:
        node, loop = self._node, asyncio.get_running_loop()
        start = loop.time()
        exchange = DendriteExchange(
            node.dendrite, node.neighbours.endpoint, run=node.loaded.run_id, number=roster.round
        )
        outcome = await merge(terms, record, self.replica.public, desk, board=ChainBoard(node), exchange=exchange)
        if self.replica.held != roster.round:
            log.warning("round %d: stage %d has gone on to another state meanwhile", roster.round, self.stage)
            return
        after, taken = outcome.public, outcome.taken
        if outcome.incomplete:
            found = await after_merge(node, roster, self.stage, until=terms.marks.end + PATIENCE_BLOCKS)
            if found is None and await said_beyond(node, roster, self.stage):
                log.warning("round %d: stage %d could not get what was merged", roster.round, self.stage)
                return
            if found is None:  # nobody has it: then it was not merged, for all alike
                log.warning("round %d: nobody at stage %d has what was merged: it is owed", roster.round, self.stage)
            after, taken = (self.replica.public, ()) if found is None else (found, taken)
        change = await asyncio.to_thread(self.replica.merged, after, taken)
        await self.worker.change_weights(change, held=self.replica.held)
        await self.serve()
        self._report(roster, outcome, loop.time() - start)
        await self._checkpoint()
        if record is not None:
            done = replace(record, phase=Phase.DONE, weights=self.digest)
            await node.publish(done, until=roster.block + self._manifest.round.length + self._manifest.round.close)

    def _report(self, roster: Roster, outcome: Outcome, seconds: float) -> None:
        node = self._node
        for kind, found in (("refused", outcome.refused), ("forged", outcome.forged)):
            for hotkey, reason in found.items():
                node.telemetry.emit(
                    MergeFault(round=roster.round, stage=self.stage, hotkey=hotkey, fault=kind, reason=reason)
                )
        for hotkey, shards in outcome.liars.items():
            reason = f"published another digest than the recomputed one for shards {', '.join(map(str, shards))}"
            node.telemetry.emit(
                MergeFault(round=roster.round, stage=self.stage, hotkey=hotkey, fault="liar", reason=reason)
            )
        node.telemetry.emit(
            MergedEvent(
                round=roster.round,
                stage=self.stage,
                sources=len(outcome.listed),
                included=outcome.included,
                void=not outcome.listed,
                weights=self.digest.hex(),
                seconds=round(seconds, 3),
                carried=sum(map(len, outcome.carried)) if outcome.listed else 0,
                received=sum(outcome.received.values()),
            )
        )
        node.telemetry.emit(traffic(node))

    async def _checkpoint(self) -> None:
        """The public state on this node's disk or object store, before anybody is told that it is held."""
        tensors = unflatten(self.engine.stage, self.replica.public.theta)
        tensors |= {"outer.momentum": self.replica.public.momentum}
        place = await self._keeper.keep_stage(self.stage, self.replica.held, tensors, self.engine.version)
        if place is not None:
            self._node.telemetry.emit(CheckpointWritten(round=self.replica.held, stage=self.stage, path=place))
            await asyncio.to_thread(forget, self._node.downloads)

    async def shut_down(self) -> None:
        """Stop training and merging, at once."""
        tasks: list[asyncio.Task[object]] = [*self._merges.values(), *self._picking]
        if self._announcing is not None:
            tasks.append(self._announcing)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.worker.shut_down()


def build_worker(
    node: Node,
    stage: int,
    *,
    engine: Callable[..., StageEngine] = StageEngine,
    worker: Callable[..., StageWorker] = StageWorker,
) -> StageWorker:
    """A stage's worker, with the weights every replica starts from. Both parts are built as their classes are."""
    manifest = node.loaded.manifest
    config = manifest.model.config()
    plan, layout = node.plans[stage], node.layouts[stage]
    memory = fitted(manifest, plan, layout, memory=node.around.free_memory(), card=card(node.device))
    held = Holding(memory.recompute, memory.graphs)
    what = "stage %d computes on %s: %s, the least recompute that fits; it takes %s of %s free"
    log.info(what, stage, node.device, held, written(memory.total), written(memory.card))
    node.telemetry.emit(
        StageFitted(
            stage=stage,
            device=str(node.device),
            recompute=memory.recompute.value,
            graphs=memory.graphs,
            needed=memory.total,
            free=memory.card,
        )
    )
    built = engine(
        build_stage(config, plan, manifest.run.seed, device=node.device),
        manifest.optimizer.inner(),
        plan,
        n_total_params=total_parameters(config, plan.count),
        accumulation=manifest.optimizer.accumulation,
        recompute=held.recompute,
        graphs=held.graphs,
        capacity=capacity_of(plan),
    )
    return worker(
        identity=node.identity,
        loaded=node.loaded,
        engine=built,
        corpus=node.corpus,
        dendrite=node.dendrite,
        endpoint_of=node.neighbours.endpoint,
        telemetry=node.telemetry,
    )


def traffic(node: Node) -> Traffic:
    """Bytes sent so far by kind: requests through the dendrite, replies through the axon."""
    sent = {route: counter.sent for route, counter in node.dendrite.counters.items()}
    received = {route: counter.received for route, counter in node.dendrite.counters.items()}
    return Traffic(
        forward=sent.get("forward", 0),
        backward=sent.get("backward", 0),
        merge=sum(received.get(route, 0) for route in ("leaves", "payload", "shard")),
        evidence=sum(received.get(route, 0) for route in ("evidence", "window", "unit", "tree", "piece")),
    )
