"""The round machine of a miner: train, then merge with the chain as coordinator, then train again.

Four blocks of a round are deadlines (manifest `[round]`). At `stop` heads start nothing more, at `close` every stage
takes its last step; then CUT (roots on chain), HAVE (bitmaps on chain) and the next round's first block (digest of its
weights on chain). What happens to those who miss one is defined: no root at CUT, no part in the merge; a payload that
too few hold is left out and its contribution stays in the replica's own weights, so the next pseudo-gradient holds it;
a replica that lacks a listed payload takes the merged weights from a sibling, checked against the digest on chain.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from model.checkpoint import CheckpointInfo, save
from model.stage import flatten, unflatten
from neurons.archive import Archive, RoundArchive
from neurons.download import DownloadError, download
from neurons.library import Library
from neurons.node import CHAIN_STALL, Node, NodeError
from neurons.pipeline import StageWorker
from neurons.telemetry import CheckpointWritten, RoundStarted, Traffic
from neurons.telemetry import Merged as MergedEvent
from subnet.chain import ChainError
from subnet.messages import Payload, PayloadRequest, table
from subnet.swarm import content
from subnet.swarm.codec import PayloadError, codec_of
from subnet.swarm.merge import Merged, Source, accepted, agreed_weights, apply, cut_sources, rebase
from subnet.swarm.public import counts_of
from subnet.swarm.record import Phase, Record, bind_roots
from subnet.swarm.roster import Roster, records_of
from subnet.transport.errors import TransportError
from subnet.transport.synapse import tensor_bytes
from subnet.trust.ledger import Evidence

log = logging.getLogger("orion.neurons.rounds")

FETCH_DEADLINE = 30.0
FETCH_PAUSE = 0.2
PACE_BLOCKS = 10
STEP_BOUND = 8.0
"""An Adam-like step moves a weight by about its rate; a payload that claims this many times more is refused."""


class RoundMachine:
    """One replica's rounds. `public` is what every replica of the stage holds alike."""

    def __init__(self, node: Node, worker: StageWorker, archive: Archive, library: Library) -> None:
        self._node = node
        self._worker = worker
        self._archive = archive
        self._library = library
        self._manifest = node.loaded.manifest
        self._codec = codec_of(self._manifest.merge.codec)
        self._stage = worker.engine.stage
        theta = flatten(self._stage)
        self._counts = counts_of(theta.numel(), self._codec)
        self.public = Merged(theta, torch.zeros(self._counts["momentum"]))
        self._announcing: asyncio.Task[None] | None = None

    @property
    def parameters(self) -> int:
        return self.public.theta.numel()

    async def play(self, roster: Roster, start: int) -> None:
        """One whole round beginning at block `start`."""
        node, marks = self._node, self._manifest.round
        loop = asyncio.get_running_loop()
        number, index = roster.round, self._worker.plan.index
        held = self._archive.open(number)
        weights = await self._library.keep(number, self.public)
        node.telemetry.emit(
            RoundStarted(
                round=number,
                block=start,
                stage=index,
                replicas=[len(stage) for stage in roster.stages],
                roster=roster.digest.hex(),
            )
        )
        evidence = await self._train(roster, start, held)
        merge_start = loop.time()
        payload = self._codec.encode(self.public.theta - flatten(self._stage))
        held.payload_root = content.root(content.leaves(content.cut(payload)))
        held.payloads[node.identity.hotkey] = (payload, evidence.root)
        held.evidence = evidence
        record = Record(
            run=node.loaded.run_id,
            round=number,
            phase=Phase.CUT,
            work=len(evidence.leaves),
            root=bind_roots(held.payload_root, evidence.root),
            roster=roster.digest,
            weights=weights,
        )
        await self._publish(record, until=start + marks.have)
        sources = cut_sources(roster.stages[index], records_of(await node.state(start + marks.cut)), number)
        have = await self._collect(sources, number, held, until=start + marks.have - 1)
        record = replace(record, phase=Phase.HAVE, have=have)
        await self._publish(record, until=start + marks.length)
        listed = accepted(sources, records_of(await node.state(start + marks.have)), number)
        included = node.identity.hotkey in {source.hotkey for source in listed}
        await self._merge(listed, number, held, included=included, until=start + marks.length - 1)
        weights = await self._library.keep(number + 1, self.public)
        record = replace(record, phase=Phase.DONE, weights=weights)
        # The next round need not wait for this one: nobody reads it before its first windows are audited.
        self._announcing = asyncio.create_task(self._publish(record, until=start + marks.length + marks.close))
        await self._checkpoint(number + 1)
        node.telemetry.emit(
            MergedEvent(
                round=number,
                stage=index,
                sources=len(listed),
                included=included,
                void=not listed,
                weights=weights.hex(),
                seconds=round(loop.time() - merge_start, 3),
            )
        )
        node.telemetry.emit(traffic(node))

    async def _train(self, roster: Roster, start: int, held: RoundArchive) -> Evidence:
        node, marks = self._node, self._manifest.round
        seed = await node.seed(start, "orion/route/1")
        self._worker.begin(roster.round, roster, seed, held)
        drive = None
        if self._worker.plan.is_first:
            closing_at = await self._time_of(start + marks.close)
            drive = asyncio.create_task(self._worker.drive(closing_at=closing_at))
        try:
            await node.wait(start + marks.close)
        finally:
            self._worker.stop()
            if drive is not None:
                await drive
        _, evidence = await self._worker.close()
        return evidence

    async def _time_of(self, block: int) -> float:
        """When `block` will be finalized, by the loop's clock, at the pace of the last blocks."""
        chain = self._node.chain
        head = await chain.finalized()
        before = await chain.wait_for_block(max(1, head.number - PACE_BLOCKS), timeout=CHAIN_STALL)
        pace = (head.timestamp_ms - before.timestamp_ms) / 1000 / max(1, head.number - before.number)
        return asyncio.get_running_loop().time() + (block - head.number) * pace

    async def settle(self) -> None:
        """Wait until the last record is on chain."""
        if self._announcing is not None:
            await self._announcing

    async def _publish(self, record: Record, *, until: int) -> None:
        """Put a record on chain. Deadlines are kept by reading the chain at their block, so a late record costs this
        round's part, not the node; `until` only keeps it out of later phases."""
        try:
            await self._node.chain.publish(record.encode(), until_block=until)
        except ChainError as error:
            log.warning("record of round %d (%s) missed block %d: %s", record.round, record.phase.name, until, error)

    async def _collect(self, sources: Sequence[Source], number: int, held: RoundArchive, *, until: int) -> int:
        """Fetch the other sources' payloads, all at once; returns the bitmap of those held."""
        others = [source for source in sources if source.hotkey not in held.payloads]
        await asyncio.gather(*(self._fetch_payload(source, [source], number, held, until=until) for source in others))
        return sum(1 << source.index for source in sources if source.hotkey in held.payloads)

    async def _fetch_payload(
        self, source: Source, holders: Sequence[Source], number: int, held: RoundArchive, *, until: int
    ) -> None:
        """Try the holders in turn until the payload is here and proven, or block `until` has passed."""
        node = self._node
        turn = 0
        while source.hotkey not in held.payloads and (await node.chain.finalized()).number < until:
            holder = holders[turn % len(holders)].hotkey
            turn += 1
            try:
                reply, tensors = await node.dendrite.call(
                    node.neighbours.endpoints.get(holder, ""),
                    holder,
                    PayloadRequest(run=node.loaded.run_id.hex(), round=number, source=source.hotkey),
                    reply=Payload,
                    reply_specs={"payload": table(1, self._codec.payload_bytes(self.parameters))},
                    deadline=FETCH_DEADLINE,
                )
                payload = bytes(tensor_bytes(tensors["payload"]))
                evidence = bytes.fromhex(reply.evidence)
            except TransportError as error:
                log.debug("payload of %s from %s: %s", source.hotkey, holder, error)
                await asyncio.sleep(FETCH_PAUSE)
                continue
            if bind_roots(content.root(content.leaves(content.cut(payload))), evidence) != source.root:
                log.warning("round %d: what %s serves for %s has another root on chain", number, holder, source.hotkey)
                await asyncio.sleep(FETCH_PAUSE)
                continue
            try:
                self._codec.decode(payload, self.parameters, limit=self._largest_change(source.work))
            except PayloadError as error:
                log.warning("round %d: %s is left out: %s", number, source.hotkey, error)
                return
            held.payloads[source.hotkey] = (payload, evidence)

    def _largest_change(self, work: int) -> float:
        """No weight moves further than this in a round of `work` units, at the optimizer's own pace."""
        optimizer = self._manifest.optimizer
        return STEP_BOUND * optimizer.lr * (1 + work / optimizer.accumulation)

    async def _merge(
        self, listed: Sequence[Source], number: int, held: RoundArchive, *, included: bool, until: int
    ) -> None:
        """Bring public state and own weights to the next round."""
        for source in listed:
            if source.hotkey not in held.payloads:
                await self._fetch_payload(source, listed, number, held, until=until)
        before = self.public
        if all(source.hotkey in held.payloads for source in listed):
            deltas = [self._codec.decode(held.payloads[source.hotkey][0], self.parameters) for source in listed]
            self.public = apply(before, deltas, self._manifest.optimizer.outer())
        else:
            self.public = await self._take_public(listed, number + 1)
        weights = rebase(flatten(self._stage), before, self.public, included=included)
        self._worker.engine.replace_weights(weights)

    async def _take_public(self, holders: Sequence[Source], number: int) -> Merged:
        """The public state at the start of round `number` from a sibling, as most of the siblings' records say."""
        node = self._node
        start = (await node.chain.finalized()).number
        for block in range(start, start + self._manifest.round.length):
            records = records_of(await node.state(block))
            agreed = agreed_weights([holder.hotkey for holder in holders], records, number - 1)
            if agreed is None:
                continue
            try:
                fetched = await download(
                    node.dendrite,
                    node.neighbours.endpoints.get,
                    sources=[holder.hotkey for holder in holders],
                    run=node.loaded.run_id,
                    held=number,
                    agreed=agreed,
                    counts=self._counts,
                )
            except DownloadError as error:
                log.warning("%s", error)
                continue
            return fetched.state
        raise NodeError(
            f"stage {self._worker.plan.index} has no sibling that serves the weights of round {number}: "
            "restart this miner to join again"
        )

    async def _checkpoint(self, number: int) -> None:
        """Public weights and outer momentum of the stage at the start of round `number`, on this node's disk."""
        path = checkpoint_path(self._node.config.out, self._worker.plan.index, number)
        tensors = unflatten(self._stage, self.public.theta)
        await asyncio.to_thread(
            save,
            path,
            tensors | {"outer.momentum": self.public.momentum},
            CheckpointInfo(
                manifest_hash=self._node.loaded.digest.hex(), round=number, version=self._worker.engine.version
            ),
        )
        self._node.telemetry.emit(CheckpointWritten(round=number, stage=self._worker.plan.index, path=str(path)))


def checkpoint_path(out: Path, stage: int, number: int) -> Path:
    return out / "checkpoints" / f"stage-{stage:02d}" / f"round-{number:05d}.safetensors"


def traffic(node: Node) -> Traffic:
    """Bytes sent so far by kind: requests through the dendrite, replies through the axon."""
    sent = {route: counter.sent for route, counter in node.dendrite.counters.items()}
    received = {route: counter.received for route, counter in node.dendrite.counters.items()}
    return Traffic(
        forward=sent.get("forward", 0),
        backward=sent.get("backward", 0),
        merge=received.get("payload", 0),
        evidence=sum(received.get(route, 0) for route in ("evidence", "window", "unit", "tree", "piece")),
    )
