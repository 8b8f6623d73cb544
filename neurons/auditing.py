"""One validator's judgement of a run: what it audits of each closed round, and what that makes of the miners' weights.

Once a round's roots are on chain and its slots' seeds are known, every miner's closed ledger is fetched and checked
against its root and against what the miner signed while the round went on. Seeds pick windows, a secret committed
before the round picks units inside; these are replayed. That every head trained on the samples it was assigned is
checked for all of them: it costs a hash. Everything is fetched from all miners at once, so nobody's slowness makes
another one late; stages are replayed one after another.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import secrets
from collections.abc import Iterable, Mapping, Sequence

from model.accounting import stage_flops
from model.data import Corpus
from neurons.evidence import Case, EvidenceReader, replay_cases
from neurons.follower import PublicStates, RoundStart
from neurons.node import Node
from neurons.notary import Notary
from neurons.telemetry import Checked, Convicted, MinerScored, Settled, WeightsSet
from subnet.chain import ChainError
from subnet.identity import verify
from subnet.metagraph import ChainState
from subnet.swarm.observers import observers, stakes
from subnet.swarm.record import Record
from subnet.swarm.roster import Roster, records_of
from subnet.transport.synapse import tensor_bytes
from subnet.trust.audit import budget, comparable, select_units, select_windows, spread
from subnet.trust.finding import Check, Finding, Grade
from subnet.trust.heads import ack_message, acknowledged, chain, conflicting, slot_end, slots_in
from subnet.trust.ledger import Direction, Evidence, digest
from subnet.trust.scoring import History, Kept, Score, marks_kept, scarcity, score, weights
from subnet.trust.settlement import NOTHING, Settlement, settle

log = logging.getLogger("orion.neurons.auditing")

MARKS = ("root", "evidence", "bitmap")


class Auditor:
    """Audits, scores and weights, round after round."""

    def __init__(self, node: Node, states: PublicStates, notary: Notary) -> None:
        self._node = node
        self._notary = notary
        self._states = states
        self._reader = EvidenceReader(node)
        self._history = History(node.loaded.manifest.score.rounds)
        self._secret = bytes(32)

    def commit(self) -> bytes:
        """Draw the secret of the round that begins; what the validator's record says of it."""
        self._secret = secrets.token_bytes(32)
        return hashlib.sha256(self._secret).digest()

    async def judge(self, roster: Roster, start: RoundStart) -> None:
        """Audit, settle and score a round whose roots are on chain, and set weights."""
        node, manifest = self._node, self._node.loaded.manifest
        marks = manifest.round
        state = await node.state(roster.block + marks.cut)
        seeds = await self._seeds(roster)
        records = records_of(state)
        members = [hotkey for stage in roster.stages for hotkey in stage]
        tables = await asyncio.gather(*(self._reader.tables(hotkey, roster, records.get(hotkey)) for hotkey in members))
        evidence = {hotkey: table for hotkey, table in zip(members, tables, strict=True) if table is not None}
        weighing = stakes(observers(state, node.loaded.run_id))
        part = weighing.get(node.identity.hotkey, 0.0) / (sum(weighing.values()) or 1.0)
        fetched = await asyncio.gather(
            *(self._fetch(hotkey, roster, table, seeds, start, part) for hotkey, table in evidence.items())
        )
        findings = await asyncio.to_thread(self._data_audit, roster, evidence)
        findings += self._heads_audit(roster, evidence)
        for hotkey, cases in zip(evidence, fetched, strict=True):
            findings += await asyncio.to_thread(self._replay, roster, hotkey, cases)
        settlement = settle(
            node.loaded.run_id,
            roster,
            evidence,
            verify,
            first_sample=roster.round * manifest.data.samples_per_round,
            seed=await node.seed(roster.block, "orion/route/1"),
            windows={
                hotkey: payable(table, node.loaded.run_id, roster.round, hotkey, weighing, node.identity.hotkey)
                for hotkey, table in evidence.items()
            },
        )
        findings += settlement.findings
        self._report(findings)
        at_have = records_of(await node.state(roster.block + marks.have))
        kept = marks_kept(roster, records, at_have, served=set(evidence))
        await self._score(roster, state, settlement, findings, kept, records)
        self._notary.forget(roster.round)

    async def _seeds(self, roster: Roster) -> list[bytes]:
        """The seeds of the round's slots."""
        marks, rules = self._node.loaded.manifest.round, self._node.loaded.manifest.audit
        return [
            await self._node.seed(roster.block + slot_end(slot, rules.slot) + rules.seed_delay, "orion/slot/1")
            for slot in range(slots_in(marks.close, rules.slot, rules.grace))
        ]

    # -- audits -------------------------------------------------------------------------------------------------------

    async def _fetch(
        self, hotkey: str, roster: Roster, evidence: Evidence, seeds: Sequence[bytes], start: RoundStart, part: float
    ) -> list[Case]:
        """Weights and tensors of the units picked in one miner's ledger."""
        rules, plan = self._node.loaded.manifest.audit, self._node.plans[roster.stage_of(hotkey) or 0]
        picked = [
            (head, seed)
            for slot, seed in enumerate(seeds)
            for head in select_windows(evidence.heads, seed=seed, hotkey=hotkey, slot=slot, count=rules.windows)
        ]
        units = budget(len(evidence.leaves), share=rules.share, stake_share=part)
        sizes = [sum(comparable(plan, leaf) for leaf in evidence.window(head.version)) for head, _ in picked]
        picks = [
            (
                head,
                select_units(
                    evidence,
                    head,
                    secret=self._secret,
                    seed=seed,
                    hotkey=hotkey,
                    count=count,
                    fits=lambda leaf: comparable(plan, leaf),
                ),
            )
            for (head, seed), count in zip(picked, spread(units, sizes), strict=True)
            if count
        ]
        return await self._reader.cases(hotkey, roster, picks, public=start.weights(hotkey, evidence))

    def _replay(self, roster: Roster, hotkey: str, cases: Sequence[Case]) -> list[Finding]:
        manifest = self._node.loaded.manifest
        return replay_cases(
            self._states.stages[roster.stage_of(hotkey) or 0],
            cases,
            self._node.corpus,
            accumulation=manifest.optimizer.accumulation,
            tolerance=lambda _: manifest.audit.tolerance,
            hotkey=hotkey,
            number=roster.round,
        )

    def _data_audit(self, roster: Roster, evidence: Mapping[str, Evidence]) -> list[Finding]:
        return [
            finding
            for hotkey in roster.stages[0]
            if hotkey in evidence
            for finding in wrong_data(hotkey, roster.round, evidence[hotkey], self._node.corpus)
        ]

    def _heads_audit(self, roster: Roster, evidence: Mapping[str, Evidence]) -> list[Finding]:
        """Proofs that a closed ledger is not the one whose heads the miner signed."""
        found = []
        for hotkey, table in evidence.items():
            broken = conflicting(table.heads, self._notary.statements(roster.round, hotkey))
            if broken is not None:
                reason = f"the closed ledger contradicts what was signed over its first {broken.count} windows"
                found.append(
                    Finding(
                        hotkey=hotkey,
                        round=roster.round,
                        stage=roster.stage_of(hotkey) or 0,
                        check=Check.HEADS,
                        grade=Grade.PROOF,
                        passed=False,
                        error=math.inf,
                        reason=reason,
                    )
                )
        return found

    def _report(self, findings: Iterable[Finding]) -> None:
        for finding in findings:
            self._node.telemetry.emit(
                Checked(
                    round=finding.round,
                    hotkey=finding.hotkey,
                    stage=finding.stage,
                    check=finding.check,
                    grade=finding.grade,
                    passed=finding.passed,
                    error=round(finding.error, 6) if math.isfinite(finding.error) else -1.0,
                    tolerance=finding.tolerance,
                    version=finding.version,
                    sample=finding.sample,
                    piece=finding.piece,
                    reason=finding.reason,
                    accuser="",
                )
            )

    # -- scores and weights -------------------------------------------------------------------------------------------

    async def _score(
        self,
        roster: Roster,
        state: ChainState,
        settlement: Settlement,
        findings: Sequence[Finding],
        kept: Mapping[str, Kept],
        records: Mapping[str, Record | None],
    ) -> None:
        node, manifest = self._node, self._node.loaded.manifest
        config = manifest.model.config()
        flops = {
            hotkey: manifest.tokens_per_microbatch
            * stage_flops(config, node.plans[index], tokens=manifest.data.sequence)[0]
            for index, stage in enumerate(roster.stages)
            for hotkey in stage
        }
        failed = {finding.hotkey: finding.reason for finding in findings if not finding.passed}
        for hotkey, reason in failed.items():
            until = roster.round + manifest.score.rounds
            node.telemetry.emit(Convicted(round=roster.round, hotkey=hotkey, until=until, reason=reason))
        scores = self._history.close(
            score(
                settlement,
                forward_flops=flops,
                correctness=dict.fromkeys(failed, 0.0),
                timeliness={hotkey: marks.share for hotkey, marks in kept.items()},
                scarcity=scarcity(roster, cap=manifest.score.scarcity),
            ),
            failed,
        )
        shares = self._history.shares()
        uids = {neuron.hotkey: neuron.uid for neuron in state.neurons}
        by_uid = weights(shares, uids=uids, burn=manifest.score.burn, owner=state.owner_hotkey)
        node.telemetry.emit(
            Settled(round=roster.round, microbatches=len(settlement.pathways), miners=len(settlement.paid))
        )
        for hotkey, entry in scores.items():
            if hotkey in uids:
                self._explain(roster, entry, settlement, kept[hotkey], records.get(hotkey), flops[hotkey], uids, by_uid)
        if not by_uid:
            log.warning("round %d: nobody earned a weight; the weights on chain stay", roster.round)
            return
        try:
            block = await node.chain.set_weights(by_uid)
        except ChainError as error:
            log.warning("round %d: the weights on chain stay: %s", roster.round, error)
            return
        node.telemetry.emit(WeightsSet(round=roster.round, block=block, weights=by_uid))

    def _explain(
        self,
        roster: Roster,
        entry: Score,
        settlement: Settlement,
        kept: Kept,
        record: Record | None,
        forward_flops: float,
        uids: Mapping[str, int],
        by_uid: Mapping[int, float],
    ) -> None:
        """Every term of one miner's score, into the event log."""
        manifest, hotkey = self._node.loaded.manifest, entry.hotkey
        paid, mean = settlement.paid.get(hotkey, NOTHING), self._history.mean(hotkey)
        self._node.telemetry.emit(
            MinerScored(
                round=roster.round,
                uid=uids[hotkey],
                hotkey=hotkey,
                stage=roster.stage_of(hotkey) or 0,
                root=record.root.hex() if record is not None and kept.root else "",
                cut=roster.block + manifest.round.cut,
                claimed=paid.claimed,
                units=paid.units,
                forward=paid.forward,
                backward=paid.backward,
                unpaid={reason.value: count for reason, count in paid.unpaid.items()},
                forward_flops=forward_flops,
                flops=entry.flops,
                correctness=entry.correctness,
                timeliness=entry.timeliness,
                missed=[name for name in MARKS if not getattr(kept, name)],
                scarcity=entry.scarcity,
                score=entry.value,
                mean=mean.value,
                rounds=mean.rounds,
                share=round(self._history.shares().get(hotkey, 0.0), 6),
                burn=manifest.score.burn,
                weight=round(by_uid.get(uids[hotkey], 0.0), 6),
            )
        )


def payable(
    evidence: Evidence, run: bytes, number: int, hotkey: str, stakes: Mapping[str, float], own: str
) -> frozenset[int]:
    """Versions of the windows that most of the stake at work, or the validator `own`, acknowledged in time."""
    digests = chain(evidence.heads)
    sound = [
        ack
        for ack in evidence.acks
        if ack.validator in stakes
        and ack.count < len(digests)
        and verify(
            ack.validator,
            ack_message(run, number, hotkey=hotkey, count=ack.count, digest=digests[ack.count], slot=ack.slot),
            ack.signature,
        )
    ]
    by_most = acknowledged(evidence.heads, sound, stakes)
    by_own = acknowledged(evidence.heads, [ack for ack in sound if ack.validator == own], {own: 1.0})
    return frozenset(
        head.version for head, most, mine in zip(evidence.heads, by_most, by_own, strict=True) if most or mine
    )


def wrong_data(hotkey: str, number: int, evidence: Evidence, corpus: Corpus) -> list[Finding]:
    """Proofs that a head trained on other tokens than a sample's own: its leaf's input digest is not theirs."""
    return [
        Finding(
            hotkey=hotkey,
            round=number,
            stage=0,
            check=Check.DATA,
            grade=Grade.PROOF,
            passed=False,
            error=math.inf,
            version=leaf.version,
            sample=leaf.sample,
            reason=f"sample {leaf.sample} was trained on other tokens than its own",
        )
        for leaf in evidence.leaves
        if leaf.direction is Direction.FORWARD
        and leaf.input != digest(tensor_bytes(corpus.sample(leaf.sample)[:, :-1].contiguous()))
    ]
