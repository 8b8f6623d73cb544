"""The validator: replays units, settles ledgers, scores miners, sets weights, measures validation loss.

    python -m neurons.validator --network ws://127.0.0.1:9944 --wallet w --hotkey validator-0 \\
        --manifest manifest.toml --data shards/

It follows the same roster as the miners. A round's record commits it to a secret; once the round's roots are on chain
it audits all miners with it (`neurons.auditing`), serves its report, replays what other validators' reports say failed
(`neurons.reports`), settles, scores and sets weights (`neurons.judgement`). Rounds overlap: a round's judgement goes on
while the next one trains, so every round is a task of its own that waits for the one before where it must.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable, Coroutine, Mapping
from functools import partial

from model.stage import build_stage
from neurons.adopting import Adopter
from neurons.auditing import Auditor
from neurons.bench import Bench, forward_flops
from neurons.dossier import Dossier, RoundFacts
from neurons.faults import of_merge
from neurons.follower import Fault, PublicStates, RoundStart
from neurons.judgement import Judge, Suspicions, rule_of
from neurons.node import Node, main
from neurons.notary import Notary
from neurons.reports import ReportDesk, ReportReader, write_report
from neurons.slots import slot_seeds, watchers
from neurons.telemetry import AuditCost, NodeFinished, RoundStarted
from neurons.verdict import Closed
from subnet.swarm.observers import stakes
from subnet.swarm.record import NAMES_LIMIT, Flags, Phase, Record, short_name
from subnet.swarm.roster import Roster, records_of
from subnet.trust.audit import Tolerance
from subnet.trust.finding import Grade
from subnet.trust.ledger import Direction
from subnet.trust.report import SECRET_BYTES, FindingModel, commit
from subnet.trust.tolerance import Device, shipped, tolerance_between

log = logging.getLogger("orion.neurons.validator")

MARGIN = 4
"""Blocks before the next round's CUT by which a round's audit ends."""


class Validator:
    """One validator in one run. `new_secret` gives the bytes that a round's record commits to."""

    def __init__(self, node: Node, *, new_secret: Callable[[], bytes] | None = None) -> None:
        manifest = node.loaded.manifest
        config = manifest.model.config()
        self._node = node
        self._new_secret = new_secret or partial(node.around.entropy, SECRET_BYTES)
        self._bench = Bench([build_stage(config, plan, manifest.run.seed) for plan in node.plans])
        self._states = PublicStates(node, self._bench)
        rule = rule_of(manifest, validators=1)
        kept = node.config.out / "judgement" / node.loaded.run_id.hex()
        self._suspicions = Suspicions(kept / f"{node.config.name}-suspicions.json", rule)
        self._judge = Judge(node, self._suspicions, kept / f"{node.config.name}-scores.json")
        self._auditor = Auditor(
            loaded=node.loaded,
            plans=node.plans,
            layouts=node.layouts,
            corpus=node.corpus,
            bench=self._bench,
            dendrite=node.dendrite,
            endpoint=node.neighbours.endpoint,
            tolerance=self._tolerance,
            enter=self._judge.note,
            held=self._suspicions.of,
            risk=self._suspicions.risk,
            rule=lambda: self._suspicions.rule,
        )
        self._notary = Notary(node)
        self._desk = ReportDesk(node)
        adopter = Adopter(self._auditor, run=node.loaded.run_id, recheck=self._recheck)
        self._reader = ReportReader(node, adopter)
        self._devices: Mapping[str, Device] = {}
        """What the miners of the round that is audited say they compute with."""
        self._late: list[FindingModel] = []
        """Failed findings that came after their round's report."""

    def _tolerance(self, hotkey: str) -> Tolerance:
        miner = self._devices.get(hotkey, Device.UNNAMED)
        return tolerance_between(self._node.loaded.manifest, shipped(), miner=miner, auditor=Device.CPU)

    async def run(self) -> None:
        node, count = self._node, self._node.loaded.manifest.round.count
        node.flags |= Flags.OBSERVER
        self._desk.open()
        self._notary.open()
        await node.listen()
        roster = await node.enter()
        if roster.round == 0:
            await self._states.validate(0)
        rounds = _Rounds()
        try:
            while count == 0 or roster.round < count:
                secret = self._new_secret()
                await self._announce(roster, secret)
                rounds.start = asyncio.create_task(self._start(roster, rounds.merge))
                rounds.merge = asyncio.create_task(self._merge(roster, secret, rounds.start))
                rounds.verdict = asyncio.create_task(
                    self._judge_round(roster, secret, rounds.start, rounds.merge, rounds.verdict)
                )
                roster = await self._next(rounds)
            await asyncio.gather(*rounds.tasks)
        finally:
            for task in rounds.tasks:
                task.cancel()
            await asyncio.gather(*rounds.tasks, return_exceptions=True)
        await self._judge.finish()
        node.telemetry.emit(NodeFinished(rounds=roster.round))

    async def _next(self, rounds: _Rounds) -> Roster:
        """The next roster; a round that fails meanwhile fails the node."""
        coming = asyncio.create_task(self._node.next_roster())
        try:
            while not coming.done():
                going = [task for task in rounds.tasks if not task.done()]
                await asyncio.wait([coming, *going], return_when=asyncio.FIRST_COMPLETED)
                for task in rounds.tasks:
                    if task.done():
                        task.result()
            return coming.result()
        finally:
            coming.cancel()

    async def _announce(self, roster: Roster, secret: bytes) -> None:
        self._node.telemetry.emit(
            RoundStarted(
                round=roster.round,
                block=roster.block,
                stage=None,
                replicas=[len(stage) for stage in roster.stages],
                roster=roster.digest.hex(),
            )
        )
        self._node.convicts = self._convicts(roster.round)
        record = Record(run=self._node.loaded.run_id, round=roster.round, phase=Phase.READY, root=commit(secret))
        await self._node.publish(record)

    def _convicts(self, number: int) -> bytes:
        """Short names of those who count as convicted in round `number`: who is named by most validators holds no stage
        from the next roster on."""
        return b"".join(map(short_name, self._suspicions.convicts(number)[:NAMES_LIMIT]))

    async def _condemn(self) -> None:
        """Say at once whom a verdict has convicted: the next roster is computed before the next announcement."""
        newest = self._node.history.newest
        convicts = self._node.convicts if newest is None else self._convicts(newest.round)
        if convicts != self._node.convicts:
            self._node.convicts = convicts
            await self._node.say_again()

    # -- merges, one round after the other --------------------------------------------------------------------------

    async def _start(self, roster: Roster, before: asyncio.Task[tuple[Fault, ...]] | None) -> RoundStart:
        """What replicas begin the round with, once the merge before is through."""
        if before is not None:
            await before
        return self._states.round_start(roster)

    async def _merge(self, roster: Roster, secret: bytes, start: asyncio.Task[RoundStart]) -> tuple[Fault, ...]:
        await start
        faults = await self._states.follow(roster, secret)
        await self._states.validate(roster.round + 1)
        return faults

    async def _recheck(self, number: int, stage: int, shard: int) -> tuple[str, ...]:
        roster = self._node.history.roster(number)
        return () if roster is None else await self._states.recheck(roster, stage, shard)

    # -- verdicts, one round after the other ------------------------------------------------------------------------

    async def _judge_round(
        self,
        roster: Roster,
        secret: bytes,
        start: asyncio.Task[RoundStart],
        merge: asyncio.Task[tuple[Fault, ...]],
        before: asyncio.Task[None] | None,
    ) -> None:
        """Audit a round once its roots are on chain, exchange reports, score it, and set weights."""
        node, marks, rules = self._node, self._node.loaded.manifest.round, self._node.loaded.manifest.audit
        begun = await start
        if before is not None:
            await before
        at_work = await watchers(node, roster)
        cut = await node.state(roster.block + marks.cut)
        weights = stakes(at_work)
        facts = RoundFacts(
            roster=roster,
            records=records_of(cut),
            start=begun,
            seeds=await slot_seeds(node, roster),
            secret=secret,
            stake_share=weights.get(node.identity.hotkey, 0.0) / (sum(weights.values()) or 1.0),
            statements={hotkey: self._notary.statements(roster.round, hotkey) for hotkey in roster.members},
        )
        self._devices = {
            hotkey: Device.numbered(record.device) for hotkey, record in facts.records.items() if record is not None
        }
        self._suspicions.rule = rule_of(node.loaded.manifest, validators=len(at_work))
        self._suspicions.begin(roster.round, roster.members, anomaly=self._judge.anomalies())
        dossiers = self._auditor.open(facts)
        end = roster.block + marks.cut + marks.length - MARGIN
        closing = asyncio.create_task(node.wait(min(end, roster.block + marks.cut + rules.report) - 1))
        try:
            await self._until(end, self._auditor.audit(facts, dossiers, closing=closing))
        finally:
            closing.cancel()
        self._desk.publish(write_report(node, facts, dossiers, self._late))
        await node.wait(roster.block + marks.cut + rules.report)
        await self._until(end, self._reader.read_all(facts, dossiers, at_work))
        self._late = []
        for entry in of_merge(await merge, roster.round):
            self._judge.note(entry)
            if entry.finding.grade is not Grade.WITHHELD:
                self._late.append(FindingModel.of(entry.finding))
        self._count(roster, dossiers)
        await self._condemn()
        closed = Closed(
            roster=roster,
            cut=cut,
            have=await node.state(roster.block + marks.have),
            route_seed=await node.seed(roster.block, "orion/route/1"),
            stakes=weights,
            slots=len(facts.seeds),
        )
        await self._judge.close(closed, dossiers)
        self._notary.forget(roster.round)

    async def _until(self, block: int, work: Coroutine[None, None, None]) -> None:
        """Run it, but not beyond `block`: then the next round's turn has come, and what is found so far counts."""
        doing = asyncio.create_task(work)
        clock = asyncio.create_task(self._node.wait(block))
        try:
            await asyncio.wait([doing, clock], return_when=asyncio.FIRST_COMPLETED)
            if doing.done():
                doing.result()
            else:
                log.warning("the audit is cut short at block %d", block)
        finally:
            for task in (doing, clock):
                task.cancel()
            await asyncio.gather(doing, clock, return_exceptions=True)

    def _count(self, roster: Roster, dossiers: Mapping[str, Dossier]) -> None:
        manifest = self._node.loaded.manifest
        swarm = sum(
            (1 if leaf.direction is Direction.FORWARD else 2) * forward_flops(manifest, self._node.plans[dossier.stage])
            for dossier in dossiers.values()
            if dossier.evidence is not None
            for leaf in dossier.evidence.leaves
        )
        self._node.telemetry.emit(
            AuditCost(
                round=roster.round,
                units=sum(len(dossier.replayed) for dossier in dossiers.values()),
                flops=sum(dossier.flops for dossier in dossiers.values()),
                swarm_flops=float(swarm),
                bytes=sum(dossier.source.received for dossier in dossiers.values()),
            )
        )


class _Rounds:
    """The tasks of the rounds that are being played: each awaits its predecessor, so the newest stand for all."""

    def __init__(self) -> None:
        self.start: asyncio.Task[RoundStart] | None = None
        self.merge: asyncio.Task[tuple[Fault, ...]] | None = None
        self.verdict: asyncio.Task[None] | None = None

    @property
    def tasks(self) -> list[asyncio.Task[object]]:
        return [task for task in (self.start, self.merge, self.verdict) if task is not None]


async def validate(node: Node) -> None:
    """A validator's whole life in one run."""
    await Validator(node).run()


def run(argv: list[str]) -> int:
    """The program: flags in, exit status out."""
    return main(argv, role="validator", description="Audit, score and set weights.", body=validate)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
