"""What a validator makes of a round: suspicions, pay, scores, and the weights it sets on chain.

All of it is computed here from public evidence and this validator's own replays; nobody else's word enters. Suspicions
and scores are kept on disk, so a validator that restarts forgives nobody and forgets nobody's work.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import TypeAdapter, ValidationError

from neurons.dossier import Dossier, Entry
from neurons.node import Node
from neurons.slots import slots_of
from neurons.telemetry import AuditBroken, Checked, Convicted, Settled, WeightsSet
from neurons.verdict import Closed, Verdict
from subnet.chain import ChainError
from subnet.manifest import Manifest
from subnet.metagraph import BLOCK_SECONDS, ChainState
from subnet.swarm.roster import Roster
from subnet.trust.attribution import Attribution, trust
from subnet.trust.decision import Rule, Suspicion, tests_per_year
from subnet.trust.finding import Check, Finding
from subnet.trust.scoring import History, Past, due, weights
from subnet.trust.settlement import Settlement

log = logging.getLogger("orion.neurons.judgement")

TRUSTED_LOSSES = 60
"""A tail's word is weighed by so many of its replayed losses, the newest."""
_SUSPICIONS = TypeAdapter(dict[str, Suspicion])
_PAST = TypeAdapter(Past)
T = TypeVar("T")


class Memory(Generic[T]):
    """A value that outlives the process, as JSON in one file."""

    def __init__(self, path: Path, kind: TypeAdapter[T]) -> None:
        self._path = path
        self._kind = kind

    def recall(self, otherwise: T) -> T:
        """What was kept; `otherwise` where there is nothing or nothing that can be read, which is logged."""
        if not self._path.exists():
            return otherwise
        try:
            return self._kind.validate_json(self._path.read_bytes())
        except ValidationError as error:
            log.error("%s cannot be read, so this validator begins anew: %s", self._path, error)  # noqa: TRY400
            return otherwise

    def keep(self, value: T) -> None:
        """Write it down, whole or not at all."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_suffix(".tmp")
        temporary.write_bytes(self._kind.dump_json(value))
        temporary.replace(self._path)


class Suspicions:
    """What this validator holds against each miner, on disk after every round."""

    def __init__(self, path: Path, rule: Rule) -> None:
        self.rule = rule
        self._memory = Memory(path, _SUSPICIONS)
        self._held = self._memory.recall({})
        self._anomaly: Mapping[str, float] = {}

    def begin(self, number: int, hotkeys: Iterable[str], *, anomaly: Mapping[str, float]) -> None:
        """Round `number` begins. `anomaly` is what attribution says, a factor on audit rates."""
        self._anomaly = anomaly
        for hotkey in hotkeys:
            self._held[hotkey] = self.of(hotkey).at(number, self.rule)

    def of(self, hotkey: str) -> Suspicion:
        return self._held.get(hotkey, Suspicion())

    def enter(self, finding: Finding) -> None:
        self._held[finding.hotkey] = self.of(finding.hotkey).after(finding, self.rule)

    def unaudited(self, hotkey: str, number: int) -> None:
        self._held[hotkey] = self.of(hotkey).unaudited(number)

    def risk(self, hotkey: str) -> float:
        """Factor on the miner's audit rate."""
        return self.of(hotkey).risk(self.rule, anomaly=self._anomaly.get(hotkey, 1.0))

    def convicts(self, number: int) -> list[str]:
        """Who counts as convicted in round `number`, in hotkey order."""
        return [hotkey for hotkey, held in sorted(self._held.items()) if held.at(number, self.rule).convicted]

    def keep(self) -> None:
        self._memory.keep(self._held)


class Judge:
    """Scores round after round and sets weights. `history` is the file of the scores that weights are means of."""

    def __init__(self, node: Node, suspicions: Suspicions, history: Path) -> None:
        self.suspicions = suspicions
        self._node = node
        self._memory = Memory(history, _PAST)
        self._history = History(node.loaded.manifest.score.rounds, self._memory.recall(Past()))
        self._attribution = Attribution()
        self._losses: dict[str, deque[bool]] = defaultdict(lambda: deque(maxlen=TRUSTED_LOSSES))
        """By tail: whether its replayed losses agreed."""
        self._setting: asyncio.Task[None] | None = None
        self._waiting: tuple[int, Mapping[int, float]] | None = None
        """Round and weights that wait for their block."""
        self._last_set: int | None = None

    def note(self, entry: Entry) -> None:
        """Take in a finding: into the miner's suspicion, and the event log."""
        finding = entry.finding
        before = self.suspicions.of(finding.hotkey)
        self.suspicions.enter(finding)
        self._node.telemetry.emit(checked(entry))
        after = self.suspicions.of(finding.hotkey)
        if not finding.passed and _fallen(after) != _fallen(before):
            until = finding.round + self._node.loaded.manifest.score.rounds
            reason = f"{finding.check.value}: {finding.reason}"
            log.warning("round %d: %s counts nothing until round %d: %s", finding.round, finding.hotkey, until, reason)
            self._node.telemetry.emit(Convicted(round=finding.round, hotkey=finding.hotkey, until=until, reason=reason))
        if finding.check is Check.LOSS and not entry.accuser:
            self._losses[finding.hotkey].append(finding.passed)

    def anomalies(self) -> dict[str, float]:
        """Factors on audit rates from what pathways say (`subnet.trust.attribution`)."""
        return {hotkey: effect.risk for hotkey, effect in self._attribution.estimate().items()}

    # -- a round --------------------------------------------------------------------------------------------------

    async def close(self, closed: Closed, dossiers: Mapping[str, Dossier]) -> None:
        """Settle, score, and set weights."""
        roster, node, rules = closed.roster, self._node, self._node.loaded.manifest.score
        evidence = {hotkey: dossier.evidence for hotkey, dossier in dossiers.items() if dossier.evidence is not None}
        verdict = await asyncio.to_thread(
            Verdict.of, node.loaded, node.plans, closed, evidence, me=node.identity.hotkey
        )
        settlement = verdict.settlement
        for finding in settlement.findings:
            entry = Entry(finding)
            if finding.hotkey in dossiers:
                dossiers[finding.hotkey].entries.append(entry)
            self.note(entry)
        node.telemetry.emit(
            Settled(round=roster.round, microbatches=len(settlement.pathways), miners=len(settlement.paid))
        )
        for dossier in dossiers.values():
            if dossier.broken:
                self.suspicions.unaudited(dossier.hotkey, roster.round)
                node.telemetry.emit(AuditBroken(round=roster.round, hotkey=dossier.hotkey, reason=dossier.broken))
        self._attribute(roster, settlement, dossiers)
        active = verdict.forward_flops.keys()
        correctness = {hotkey: 0.0 if self.suspicions.of(hotkey).convicted else 1.0 for hotkey in active}
        entries = verdict.scores(correctness, cap=rules.scarcity)
        counted = self._history.close(entries, [hotkey for hotkey in active if self._fell(hotkey, roster.round)])
        shares = self._history.shares()
        uids = {neuron.hotkey: neuron.uid for neuron in closed.cut.neurons}
        by_uid = weights(shares, uids=uids, burn=rules.burn, owner=closed.cut.owner_hotkey)
        for hotkey, scored in counted.items():
            if hotkey in uids:
                uid = uids[hotkey]
                weight = by_uid.get(uid, 0.0)
                node.telemetry.emit(
                    verdict.explained(scored, self._history, shares, uid=uid, burn=rules.burn, weight=weight)
                )
        await asyncio.to_thread(self.suspicions.keep)
        await asyncio.to_thread(self._memory.keep, self._history.past)
        await self._set(roster.round, closed.cut, by_uid)

    def _fell(self, hotkey: str, number: int) -> bool:
        held = self.suspicions.of(hotkey)
        return number in _fallen(held)

    def _attribute(self, roster: Roster, settlement: Settlement, dossiers: Mapping[str, Dossier]) -> None:
        """What pathways' losses say of the miners on them."""
        replayed = {
            finding.sample
            for dossier in dossiers.values()
            for finding in dossier.findings
            if finding.check is Check.LOSS and finding.passed
        }
        audited = {path.sample: path.loss for path in settlement.pathways if path.sample in replayed}
        counts = {tail: Counter(losses) for tail, losses in self._losses.items()}
        self._attribution.add(
            roster.round,
            settlement.pathways,
            audited=audited,
            trusted={tail: trust(count[True], count[False]) for tail, count in counts.items()},
        )

    # -- weights --------------------------------------------------------------------------------------------------

    async def _set(self, number: int, state: ChainState, by_uid: Mapping[int, float]) -> None:
        """Set weights at the block that is due for it; newer ones take the place of those that still wait."""
        await self._drop_waiting()
        if not by_uid:
            log.warning("round %d: nobody earned a weight; the weights on chain stay", number)
            return
        try:
            now = (await self._node.chain.finalized()).number
            epoch = await self._node.chain.next_epoch_block()
        except ChainError as error:
            log.warning("round %d: the weights on chain stay: %s", number, error)
            return
        block = due(now, epoch=epoch, tempo=state.tempo, last=self._last_set)
        if block > now:
            self._waiting = (number, by_uid)
            self._setting = asyncio.create_task(self._set_at(block, number, by_uid))
        else:
            await self._set_at(now, number, by_uid)

    async def _set_at(self, block: int, number: int, by_uid: Mapping[int, float]) -> None:
        try:
            await self._node.wait(block)
            self._waiting = None
            landed = await self._node.chain.set_weights(by_uid)
        except ChainError as error:
            log.warning("round %d: the weights on chain stay: %s", number, error)
            return
        self._last_set = landed
        self._node.telemetry.emit(WeightsSet(round=number, block=landed, weights=dict(by_uid)))

    async def _drop_waiting(self) -> tuple[int, Mapping[int, float]] | None:
        """Weights that are being set are set; those that wait for their block are dropped and returned."""
        waiting, task = self._waiting, self._setting
        self._waiting = self._setting = None
        if task is not None:
            if waiting is not None:
                task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        return waiting

    async def finish(self) -> None:
        """The run is over: weights that wait for a better block are set now."""
        waiting = await self._drop_waiting()
        if waiting is not None:
            await self._set_at(0, *waiting)


def rule_of(manifest: Manifest, *, validators: int) -> Rule:
    """The sequential test of a run, for so many validators at work."""
    return Rule.of(
        tests_per_year=tests_per_year(
            windows=slots_of(manifest) * manifest.audit.windows,
            round_seconds=manifest.round.length * BLOCK_SECONDS,
            validators=max(1, validators),
        ),
        false_convictions=manifest.audit.false_convictions,
        rounds=manifest.score.rounds,
    )


def _fallen(held: Suspicion) -> tuple[int | None, int | None]:
    return held.convicted_round, held.withheld_round


def checked(entry: Entry) -> Checked:
    """A finding as the event log has it."""
    finding = entry.finding
    return Checked(
        round=finding.round,
        hotkey=finding.hotkey,
        stage=finding.stage,
        check=finding.check.value,
        grade=finding.grade.value,
        passed=finding.passed,
        error=round(finding.error, 6) if finding.error < float("inf") else -1.0,
        tolerance=finding.tolerance,
        version=finding.version,
        sample=finding.sample,
        piece=finding.piece,
        reason=finding.reason,
        accuser=entry.accuser,
    )
