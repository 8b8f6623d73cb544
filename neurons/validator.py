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

from model.accounting import stage_flops
from neurons.evidence import Case, EvidenceReader, replay_cases
from neurons.follower import PublicStates, RoundStart
from neurons.node import Node, main
from neurons.telemetry import (
    MinerScored,
    NodeFinished,
    RoundStarted,
    Settled,
    UnitAudited,
    WeightsSet,
)
from subnet.chain import ChainError
from subnet.identity import verify
from subnet.metagraph import ChainState
from subnet.swarm.record import Flags, Phase, Record
from subnet.swarm.roster import Roster, records_of
from subnet.trust.audit import Verdict, correctness, select_units, select_windows
from subnet.trust.ledger import (
    Evidence,
)
from subnet.trust.scoring import Paid, Score, Settlement, score, settle, weights

log = logging.getLogger("orion.neurons.validator")


class Auditor:
    """One validator's judgement of a run: what it audits, and the scores of the closed rounds."""

    def __init__(self, node: Node, states: PublicStates) -> None:
        self._node = node
        self._states = states
        self._reader = EvidenceReader(node)
        self._history: list[dict[str, Score]] = []

    # -- one round ------------------------------------------------------------------------------------------------

    async def judge(self, roster: Roster, start: RoundStart) -> None:
        """Audit, settle and score a round whose roots are on chain, and set weights."""
        node = self._node
        marks, rules = node.loaded.manifest.round, node.loaded.manifest.audit
        state = await node.state(roster.block + marks.cut)
        seed = await node.seed(roster.block + marks.cut + rules.seed_delay, "orion/audit/1")
        records = records_of(state)
        members = [hotkey for stage in roster.stages for hotkey in stage]
        tables = await asyncio.gather(*(self._reader.tables(hotkey, roster, records.get(hotkey)) for hotkey in members))
        evidence = {hotkey: table for hotkey, table in zip(members, tables, strict=True) if table is not None}
        # Everything is fetched from all miners at once, so nobody's slowness makes another one late.
        fetched = await asyncio.gather(
            *(self._audit(hotkey, roster, table, seed, start) for hotkey, table in evidence.items())
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

    async def _audit(
        self, hotkey: str, roster: Roster, evidence: Evidence, seed: bytes, start: RoundStart
    ) -> list[Case]:
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
        return await self._reader.cases(hotkey, roster, picks, public=start.weights(hotkey, evidence))

    def _replay(self, index: int, cases: Sequence[Case]) -> list[Verdict]:
        manifest = self._node.loaded.manifest
        return replay_cases(
            self._states.stages[index],
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
        except ChainError as error:
            log.warning("round %d: the weights on chain stay: %s", roster.round, error)
            return
        node.telemetry.emit(WeightsSet(round=roster.round, block=block, weights=by_uid))


async def validate(node: Node) -> None:
    """A validator's whole life in one run."""
    manifest = node.loaded.manifest
    node.flags |= Flags.OBSERVER
    await node.listen()
    states = PublicStates(node)
    auditor = Auditor(node, states)
    roster = await node.enter()
    if roster.round == 0:
        await states.validate(0)
    while manifest.round.count == 0 or roster.round < manifest.round.count:
        node.telemetry.emit(
            RoundStarted(
                round=roster.round,
                block=roster.block,
                stage=None,
                replicas=[len(stage) for stage in roster.stages],
                roster=roster.digest.hex(),
            )
        )
        await node.publish(Record(run=node.loaded.run_id, round=roster.round, phase=Phase.READY))
        start = states.round_start(roster)
        following = asyncio.create_task(states.follow(roster))
        try:
            await auditor.judge(roster, start)
            await following
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
        await states.validate(roster.round + 1)
        roster = await node.next_roster()
    node.telemetry.emit(NodeFinished(rounds=roster.round))


def run(argv: list[str]) -> int:
    """The program: flags in, exit status out."""
    return main(argv, role="validator", description="Audit, score and set weights.", body=validate)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
