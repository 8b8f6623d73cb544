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

import torch

from model.accounting import stage_flops
from model.stage import Stage, assign_flat, build_stage, flatten
from neurons.download import DownloadError, download
from neurons.evidence import Case, EvidenceReader, replay_cases
from neurons.node import Node, main
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
from subnet.metagraph import ChainState
from subnet.swarm.codec import codec_of
from subnet.swarm.merge import accepted, agreed_weights, cut_sources
from subnet.swarm.public import counts_of
from subnet.swarm.record import Record
from subnet.swarm.roster import Roster, records_of
from subnet.trust.audit import Verdict, correctness, select_units, select_windows
from subnet.trust.ledger import Evidence
from subnet.trust.scoring import Paid, Score, Settlement, score, settle, weights

log = logging.getLogger("orion.neurons.validator")

AGREE_STEP = 4


class Auditor:
    """One validator's view of a run: the public weights of every stage and the scores of the closed rounds."""

    def __init__(self, node: Node) -> None:
        manifest = node.loaded.manifest
        config = manifest.model.config()
        self._node = node
        self._reader = EvidenceReader(node)
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
        tables = await asyncio.gather(*(self._reader.tables(hotkey, roster, records.get(hotkey)) for hotkey in members))
        evidence = {hotkey: table for hotkey, table in zip(members, tables, strict=True) if table is not None}
        # Everything is fetched from all miners at once, so nobody's slowness makes another one late.
        fetched = await asyncio.gather(
            *(self._audit(hotkey, roster, table, seed) for hotkey, table in evidence.items())
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

    # -- audits ---------------------------------------------------------------------------------------------------

    async def _audit(self, hotkey: str, roster: Roster, evidence: Evidence, seed: bytes) -> list[Case]:
        """Weights and tensors of the units the seed picks in one miner's ledger."""
        rules = self._node.loaded.manifest.audit
        validator = self._node.identity.hotkey
        windows = select_windows(evidence, seed=seed, hotkey=hotkey, count=rules.windows)
        picks = [
            (
                window,
                select_units(evidence, window, seed=seed, hotkey=hotkey, validator=validator, count=rules.units),
            )
            for window in windows
        ]
        return await self._reader.cases(hotkey, roster, picks, public=self._public(hotkey, roster, evidence))

    def _public(self, hotkey: str, roster: Roster, evidence: Evidence) -> dict[int, torch.Tensor]:
        """The weights a round's first window must start from, where this validator knows them."""
        index = roster.stage_of(hotkey) or 0
        if self._known[index] != roster.round or hotkey in self._rebased or not evidence.windows:
            return {}
        return {min(window.version for window in evidence.windows): self._theta[index]}

    def _replay(self, index: int, cases: Sequence[Case]) -> list[Verdict]:
        manifest = self._node.loaded.manifest
        return replay_cases(
            self._stages[index],
            cases,
            self._node.corpus,
            accumulation=manifest.optimizer.accumulation,
            tolerance=manifest.audit.tolerance,
        )

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
        try:
            fetched = await download(
                node.dendrite,
                node.neighbours.endpoints.get,
                sources=replicas,
                run=node.loaded.run_id,
                held=number,
                agreed=agreed,
                counts=counts_of(self._theta[index].numel(), codec_of(node.loaded.manifest.merge.codec)),
                parts=("theta",),
            )
        except DownloadError as error:
            log.warning("stage %d: %s", index, error)
            return
        self._theta[index], self._known[index] = fetched.tensors["theta"], number

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
