"""The validator: replays units, settles ledgers, scores miners, sets weights, measures validation loss.

    python -m neurons.validator --network ws://127.0.0.1:9944 --wallet w --hotkey validator-0 \\
        --manifest manifest.toml --data shards/

It follows the same roster as the miners. Once a round's roots are on chain and the audit seed is known it fetches every
miner's closed ledger, checks it against its root, replays units of the windows the seed picks, settles what is paid,
and sets weights. Losses and scores are computed here, from public evidence.
"""

from __future__ import annotations

import asyncio
import logging
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from model.accounting import stage_flops
from model.stage import Stage, assign_flat, build_stage, flatten
from neurons.node import Node, main
from neurons.rounds import FETCH_DEADLINE, FETCH_PAUSE, public_digest
from neurons.telemetry import (
    MinerScored,
    NodeFinished,
    RoundStarted,
    Settled,
    UnitAudited,
    Validated,
    WeightsSet,
)
from subnet.chain import ChainRefused
from subnet.identity import verify
from subnet.messages import (
    EvidenceRequest,
    EvidenceTables,
    PublicPart,
    Tensors,
    UnitRequest,
    WeightsRequest,
    WindowRequest,
    evidence_specs,
    flat,
)
from subnet.metagraph import ChainState
from subnet.swarm.merge import accepted, agreed_weights, cut_sources
from subnet.swarm.record import Phase, Record, bind_roots
from subnet.swarm.roster import Roster, records_of
from subnet.transport.errors import TransportError
from subnet.transport.synapse import HEADER_LIMIT, tensor_bytes
from subnet.trust.audit import UnitTensors, Verdict, correctness, replay, select_units, select_windows
from subnet.trust.ledger import (
    LEAF_BYTES,
    WINDOW_BYTES,
    Direction,
    Evidence,
    Leaf,
    LedgerError,
    Window,
    digest,
    evidence_root,
)
from subnet.trust.scoring import Paid, Score, Settlement, score, settle, weights

log = logging.getLogger("orion.neurons.validator")

THETA_TRIES = 50
AUDIT_DEADLINE = 20.0
"""Seconds a miner has to serve everything one validator asks of it in a round."""
AGREE_STEP = 4


@dataclass(frozen=True, slots=True)
class _Case:
    """One unit to replay: what its miner served, or why it did not."""

    leaf: Leaf
    theta: torch.Tensor | None
    tensors: UnitTensors | None
    problem: str


class Auditor:
    """One validator's view of a run: the public weights of every stage and the scores of the closed rounds."""

    def __init__(self, node: Node) -> None:
        manifest = node.loaded.manifest
        config = manifest.model.config()
        self._node = node
        self._stages: list[Stage] = [build_stage(config, plan, manifest.run.seed) for plan in node.plans]
        self._theta = [flatten(stage) for stage in self._stages]
        """Public weights of every stage, as last known."""
        self._known = [0] * len(node.plans)
        """The round at whose start they are that, by stage."""
        self._rebased: set[str] = set()
        """Replicas whose own weights differ from the public ones, because their contribution was carried over."""
        self._history: list[dict[str, Score]] = []

    # -- one round ------------------------------------------------------------------------------------------------

    async def judge(self, roster: Roster, start: int) -> None:
        """Audit, settle and score the round that began at block `start`, and set weights."""
        node = self._node
        marks, rules = node.loaded.manifest.round, node.loaded.manifest.audit
        state = await node.state(start + marks.cut)
        seed = await node.seed(start + marks.cut + rules.seed_delay, "orion/audit/1")
        records = records_of(state)
        members = [hotkey for stage in roster.stages for hotkey in stage]
        tables = await asyncio.gather(*(self._evidence(hotkey, roster, records.get(hotkey)) for hotkey in members))
        evidence = {hotkey: table for hotkey, table in zip(members, tables, strict=True) if table is not None}
        # Everything is fetched from all miners at once, so nobody's slowness makes another one late.
        fetched = await asyncio.gather(
            *(self._fetch(hotkey, roster, table, seed) for hotkey, table in evidence.items())
        )
        verdicts = {
            hotkey: await asyncio.to_thread(self._replay, roster.stage_of(hotkey) or 0, parts)
            for hotkey, parts in zip(evidence, fetched, strict=True)
        }
        self._report(roster, verdicts)
        settlement = settle(
            node.loaded.run_id,
            roster,
            evidence,
            verify,
            first_sample=roster.round * node.loaded.manifest.data.samples_per_round,
        )
        await self._set_weights(roster, state, settlement, verdicts)

    async def _evidence(self, hotkey: str, roster: Roster, record: Record | None) -> Evidence | None:
        """A miner's closed ledger, if it is what its root on chain says; None otherwise, with the reason logged."""
        if record is None or record.round != roster.round or record.phase < Phase.CUT:
            log.warning("round %d: %s fixed no evidence on chain in time", roster.round, hotkey)
            return None
        node = self._node
        quota = node.loaded.manifest.data.samples_per_round
        if record.work > 2 * quota:
            log.warning("round %d: %s claims %d units, a round has %d", roster.round, hotkey, record.work, 2 * quota)
            return None
        try:
            reply, tensors = await node.dendrite.call(
                node.neighbours.endpoints.get(hotkey, ""),
                hotkey,
                EvidenceRequest(run=node.loaded.run_id.hex(), round=roster.round),
                reply=EvidenceTables,
                reply_specs=lambda fields: evidence_specs(record.work, min(fields.windows, record.work)),
                max_reply_bytes=HEADER_LIMIT + record.work * (LEAF_BYTES + WINDOW_BYTES),
                deadline=FETCH_DEADLINE,
            )
            leaves, windows = tensor_bytes(tensors["leaves"]), tensor_bytes(tensors["windows"])
            if bind_roots(bytes.fromhex(reply.payload), evidence_root(leaves, windows)) != record.root:
                raise LedgerError("its evidence does not hash to its root on chain")
            evidence = Evidence.parse(leaves, windows)
            first = roster.round * quota
            evidence.check(stage=roster.stage_of(hotkey) or 0, samples=range(first, first + quota))
        except (TransportError, LedgerError) as error:
            log.warning("round %d: no evidence from %s: %s", roster.round, hotkey, error)
            return None
        return evidence

    # -- audits ---------------------------------------------------------------------------------------------------

    async def _fetch(self, hotkey: str, roster: Roster, evidence: Evidence, seed: bytes) -> list[_Case]:
        """Weights and tensors of the units the seed picks, within one deadline for the whole miner."""
        rules = self._node.loaded.manifest.audit
        index = roster.stage_of(hotkey) or 0
        cases: list[_Case] = []
        deadline = asyncio.get_running_loop().time() + AUDIT_DEADLINE
        for window in select_windows(evidence, seed=seed, hotkey=hotkey, count=rules.windows):
            units = select_units(
                evidence, window, seed=seed, hotkey=hotkey, validator=self._node.identity.hotkey, count=rules.units
            )
            try:
                async with asyncio.timeout_at(deadline):
                    theta = await self._window_weights(hotkey, roster, evidence, window, index)
                    served = [await self._unit(hotkey, roster, leaf, index) for leaf in units]
            except (TransportError, LedgerError, TimeoutError) as error:
                why = str(error) or f"nothing complete within {AUDIT_DEADLINE:g} s"
                cases.extend(_Case(leaf, None, None, f"evidence withheld or wrong: {why}") for leaf in units)
            else:
                cases.extend(_Case(leaf, theta, tensors, "") for leaf, tensors in zip(units, served, strict=True))
        return cases

    def _replay(self, index: int, cases: Sequence[_Case]) -> list[Verdict]:
        """Verdicts on one miner's units. What was not served counts as failed here, in this validator's own score."""
        node, rules = self._node, self._node.loaded.manifest.audit
        stage, verdicts = self._stages[index], []
        loaded: torch.Tensor | None = None
        for case in cases:
            if case.theta is None or case.tensors is None:
                verdicts.append(Verdict(case.leaf, False, math.inf, case.problem))
                continue
            if case.theta is not loaded:  # units of one window share its weights
                assign_flat(stage, case.theta)
                loaded = case.theta
            targets = node.corpus.sample(case.leaf.sample)[:, 1:] if node.plans[index].is_last else None
            accumulation = node.loaded.manifest.optimizer.accumulation
            verdicts.append(
                replay(
                    stage,
                    case.leaf,
                    case.tensors,
                    targets=targets,
                    accumulation=accumulation,
                    tolerance=rules.tolerance,
                )
            )
        return verdicts

    def _report(self, roster: Roster, verdicts: Mapping[str, Sequence[Verdict]]) -> None:
        for hotkey, found in verdicts.items():
            for verdict in found:
                self._node.telemetry.emit(
                    UnitAudited(
                        round=roster.round,
                        hotkey=hotkey,
                        stage=verdict.leaf.stage,
                        direction=verdict.leaf.direction.name.lower(),
                        sample=verdict.leaf.sample,
                        passed=verdict.passed,
                        error=round(verdict.error, 6) if math.isfinite(verdict.error) else -1.0,
                        reason=verdict.reason,
                    )
                )

    async def _window_weights(
        self, hotkey: str, roster: Roster, evidence: Evidence, window: Window, index: int
    ) -> torch.Tensor:
        """The window's weights as served; a round's first window must start from the public ones."""
        node = self._node
        first = min(entry.version for entry in evidence.windows)
        public = self._known[index] == roster.round and hotkey not in self._rebased
        if window.version == first and public:
            if window.weights != digest(tensor_bytes(self._theta[index])):
                raise LedgerError(f"its first window of round {roster.round} does not start from the public weights")
            return self._theta[index]
        _, tensors = await node.dendrite.call(
            node.neighbours.endpoints.get(hotkey, ""),
            hotkey,
            WindowRequest(run=node.loaded.run_id.hex(), round=roster.round, version=window.version),
            reply=Tensors,
            reply_specs={"weights": flat(self._theta[index].numel())},
            deadline=FETCH_DEADLINE,
        )
        if digest(tensor_bytes(tensors["weights"])) != window.weights:
            raise LedgerError(f"the weights of window {window.version} do not hash to its head")
        return tensors["weights"]

    async def _unit(self, hotkey: str, roster: Roster, leaf: Leaf, index: int) -> UnitTensors:
        """A unit's tensors, each checked against its leaf; the head's input against the sample itself."""
        node = self._node
        backward = leaf.direction is Direction.BACKWARD
        _, tensors = await node.dendrite.call(
            node.neighbours.endpoints.get(hotkey, ""),
            hotkey,
            UnitRequest(run=node.loaded.run_id.hex(), round=roster.round, sample=leaf.sample, backward=backward),
            reply=Tensors,
            reply_specs=node.shapes.unit(node.plans[index], backward=backward),
            deadline=FETCH_DEADLINE,
        )
        for name in ("input", "gradient", "output"):
            if name in tensors and digest(tensor_bytes(tensors[name])) != getattr(leaf, name):
                raise LedgerError(f"the {name} of sample {leaf.sample} does not hash to its leaf")
        if index == 0 and not torch.equal(tensors["input"], node.corpus.sample(leaf.sample)[:, :-1]):
            raise LedgerError(f"sample {leaf.sample} was trained on other tokens than its own")
        return UnitTensors(tensors["input"], tensors.get("gradient"), tensors.get("output"))

    # -- scores and weights ---------------------------------------------------------------------------------------

    async def _set_weights(
        self, roster: Roster, state: ChainState, settlement: Settlement, verdicts: Mapping[str, Sequence[Verdict]]
    ) -> None:
        node, manifest = self._node, self._node.loaded.manifest
        config = manifest.model.config()
        flops = {
            hotkey: manifest.tokens_per_microbatch
            * stage_flops(config, node.plans[index], tokens=manifest.data.sequence)[0]
            for index, stage in enumerate(roster.stages)
            for hotkey in stage
        }
        marks = {hotkey: correctness(found) for hotkey, found in verdicts.items()}
        scores = score(settlement, forward_flops=flops, correctness=marks)
        self._history.append(scores)
        shares = weights(self._history, rounds=manifest.score.rounds)
        uids = {neuron.hotkey: neuron.uid for neuron in state.neurons}
        node.telemetry.emit(
            Settled(round=roster.round, microbatches=len(settlement.pathways), miners=len(settlement.paid))
        )
        for hotkey, entry in scores.items():
            paid = settlement.paid.get(hotkey, Paid(0, 0, 0))
            if hotkey not in uids:
                continue
            node.telemetry.emit(
                MinerScored(
                    round=roster.round,
                    uid=uids[hotkey],
                    hotkey=hotkey,
                    stage=roster.stage_of(hotkey) or 0,
                    units=paid.forward + paid.backward,
                    claimed=paid.claimed,
                    flops=entry.flops,
                    correctness=entry.correctness,
                    score=entry.value,
                    weight=round(shares.get(hotkey, 0.0), 6),
                )
            )
        by_uid = {uids[hotkey]: weight for hotkey, weight in shares.items() if hotkey in uids}
        if not by_uid:
            log.warning("round %d: nobody earned a weight; the weights on chain stay", roster.round)
            return
        try:
            block = await node.chain.set_weights(by_uid)
        except ChainRefused as error:
            log.warning("round %d: the weights on chain stay: %s", roster.round, error)
            return
        node.telemetry.emit(WeightsSet(round=roster.round, block=block, weights=by_uid))

    # -- public weights and validation loss -----------------------------------------------------------------------

    async def follow(self, roster: Roster, start: int) -> None:
        """Take the public weights after the round that began at `start`, from whoever serves what the chain says."""
        marks = self._node.loaded.manifest.round
        at_cut, at_have = [await self._records(start + mark) for mark in (marks.cut, marks.have)]
        self._rebased = set()
        for index, replicas in enumerate(roster.stages):
            sources = cut_sources(replicas, at_cut, roster.round)
            listed = [source.hotkey for source in accepted(sources, at_have, roster.round)]
            self._rebased.update(set(replicas) - set(listed))
            if not listed:  # a void round leaves the public weights as they are
                self._known[index] += self._known[index] == roster.round
                continue
            agreed = await self._agreed(listed, roster.round, start + marks.length)
            if agreed is None:
                log.warning("round %d: stage %d agreed on no weights in time", roster.round, index)
            else:
                await self._take_theta(index, listed, roster.round + 1, agreed)

    async def _records(self, block: int) -> dict[str, Record | None]:
        return records_of(await self._node.state(block))

    async def _agreed(self, replicas: Sequence[str], number: int, block: int) -> bytes | None:
        """What most of the merge's sources committed as the weights after round `number`, from `block` on."""
        for later in range(0, self._node.loaded.manifest.round.close, AGREE_STEP):
            records = await self._records(block + later)
            agreed = agreed_weights(replicas, records, number)
            if agreed is not None:
                return agreed
        return None

    async def _take_theta(self, index: int, replicas: Sequence[str], number: int, agreed: bytes) -> None:
        node = self._node
        for attempt in range(THETA_TRIES):
            hotkey = replicas[attempt % len(replicas)]
            try:
                reply, tensors = await node.dendrite.call(
                    node.neighbours.endpoints.get(hotkey, ""),
                    hotkey,
                    WeightsRequest(run=node.loaded.run_id.hex(), round=number, part="theta"),
                    reply=PublicPart,
                    reply_specs={"weights": flat(self._theta[index].numel())},
                    deadline=FETCH_DEADLINE,
                )
            except TransportError as error:
                log.debug("weights of stage %d from %s: %s", index, hotkey, error)
                await asyncio.sleep(FETCH_PAUSE)
                continue
            if public_digest(digest(tensor_bytes(tensors["weights"])), bytes.fromhex(reply.other)) == agreed:
                self._theta[index], self._known[index] = tensors["weights"], number
                return
            log.warning("weights of stage %d from %s are not what the chain says", index, hotkey)
        log.warning("nobody served the weights of stage %d at the start of round %d", index, number)

    async def validate(self, number: int) -> None:
        """Validation loss of the public weights at the start of round `number`, one stage at a time."""
        manifest = self._node.loaded.manifest
        if any(known != number for known in self._known):
            log.warning("no validation loss at the start of round %d: some stage's weights are not known", number)
            return
        loss = await asyncio.to_thread(self._validation_loss)
        tokens = manifest.data.validation_batches * manifest.tokens_per_microbatch
        self._node.telemetry.emit(Validated(round=number, loss=round(loss, 5), tokens=tokens))

    @torch.no_grad()
    def _validation_loss(self) -> float:
        batches = [
            self._node.corpus.validation_sample(index)
            for index in range(self._node.loaded.manifest.data.validation_batches)
        ]
        held = [tokens[:, :-1] for tokens in batches]
        for stage, theta in zip(self._stages, self._theta, strict=True):
            assign_flat(stage, theta)
            if stage.plan.is_last:
                losses = [stage.loss(x, tokens[:, 1:]) for x, tokens in zip(held, batches, strict=True)]
                return float(torch.stack(losses).mean())
            wire = self._node.shapes.boundary.dtype
            held = [stage(x).to(wire).to(torch.float32) for x in held]
        raise AssertionError("a split always ends with a last stage")


async def validate(node: Node) -> None:
    """A validator's whole life in one run."""
    manifest = node.loaded.manifest
    await node.listen()
    auditor = Auditor(node)
    await auditor.validate(0)
    roster, start = await node.first_roster()
    number = 0
    while manifest.round.count == 0 or number < manifest.round.count:
        block = manifest.round_start(start, number)
        node.telemetry.emit(
            RoundStarted(
                round=number,
                block=block,
                stage=None,
                replicas=[len(stage) for stage in roster.stages],
                roster=roster.digest.hex(),
            )
        )
        await auditor.judge(roster, block)
        await auditor.follow(roster, block)
        await auditor.validate(number + 1)
        number += 1
        roster = await node.next_roster()
    node.telemetry.emit(NodeFinished(rounds=number))


def run(argv: list[str]) -> int:
    """The program: flags in, exit status out."""
    return main(argv, role="validator", description="Audit, score and set weights.", body=validate)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
