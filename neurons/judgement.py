"""What a validator makes of a round: suspicions, pay, scores, and the weights it sets on chain.

All of it is computed here from public evidence and this validator's own replays; nobody else's word enters. Suspicions
and scores are kept on disk, so a validator that restarts forgives nobody and forgets nobody's work.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import TypeAdapter, ValidationError

from neurons.bench import forward_flops
from neurons.dossier import Dossier, Entry
from neurons.node import Node
from neurons.telemetry import Checked, Convicted, MinerScored, Settled, WeightsSet
from subnet.chain import ChainError
from subnet.identity import verify
from subnet.metagraph import ChainState
from subnet.swarm.roster import Roster, records_of
from subnet.trust.attribution import Attribution, trust
from subnet.trust.decision import Rule, Suspicion
from subnet.trust.finding import Check, Finding
from subnet.trust.heads import ack_message, acknowledged, chain
from subnet.trust.ledger import Evidence
from subnet.trust.scoring import History, Past, due, marks_kept, scarcity, score, weights
from subnet.trust.settlement import NOTHING, Settlement, settle

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

    def risk(self, hotkey: str) -> float:
        """Factor on the miner's audit rate."""
        return self.of(hotkey).risk(self.rule, anomaly=self._anomaly.get(hotkey, 1.0))

    def keep(self) -> None:
        self._memory.keep(self._held)


@dataclass(frozen=True, slots=True)
class Closed:
    """What the chain says of a round that is over."""

    roster: Roster
    cut: ChainState
    have: ChainState
    route_seed: bytes
    """Of the routing lottery."""
    stakes: Mapping[str, float]
    """Of the validators at work."""
    slots: int


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
        roster, node, manifest = closed.roster, self._node, self._node.loaded.manifest
        evidence = {hotkey: dossier.evidence for hotkey, dossier in dossiers.items() if dossier.evidence is not None}
        payable = await asyncio.to_thread(self._payable, closed, evidence)
        settlement = await asyncio.to_thread(
            settle,
            node.loaded.run_id,
            roster,
            evidence,
            verify,
            first_sample=manifest.samples(roster.round).start,
            seed=closed.route_seed,
            windows=payable,
        )
        for finding in settlement.findings:
            entry = Entry(finding)
            if finding.hotkey in dossiers:
                dossiers[finding.hotkey].entries.append(entry)
            self.note(entry)
        node.telemetry.emit(
            Settled(round=roster.round, microbatches=len(settlement.pathways), miners=len(settlement.paid))
        )
        self._attribute(roster, settlement, dossiers)
        at_cut = records_of(closed.cut)
        marks = marks_kept(roster, at_cut, records_of(closed.have), served=evidence)
        flops = {hotkey: forward_flops(manifest, node.plans[dossier.stage]) for hotkey, dossier in dossiers.items()}
        entries = score(
            settlement,
            forward_flops=flops,
            correctness={hotkey: 0.0 if self.suspicions.of(hotkey).convicted else 1.0 for hotkey in flops},
            timeliness={hotkey: mark.share for hotkey, mark in marks.items()},
            scarcity=scarcity(roster, cap=manifest.score.scarcity),
        )
        convicted = [hotkey for hotkey in flops if self._fell(hotkey, roster.round)]
        counted = self._history.close(entries, convicted)
        shares = self._history.shares()
        uids = {neuron.hotkey: neuron.uid for neuron in closed.cut.neurons}
        by_uid = weights(shares, uids=uids, burn=manifest.score.burn, owner=closed.cut.owner_hotkey)
        for hotkey, scored in counted.items():
            if hotkey in uids:
                paid, record, kept = settlement.paid.get(hotkey, NOTHING), at_cut.get(hotkey), marks[hotkey]
                mean = self._history.mean(hotkey)
                node.telemetry.emit(
                    MinerScored(
                        round=roster.round,
                        uid=uids[hotkey],
                        hotkey=hotkey,
                        stage=roster.stage_of(hotkey) or 0,
                        root=record.root.hex() if record is not None and kept.root else "",
                        cut=closed.cut.head.number,
                        claimed=paid.claimed,
                        units=paid.units,
                        forward=paid.forward,
                        backward=paid.backward,
                        unpaid={reason.value: count for reason, count in paid.unpaid.items()},
                        forward_flops=flops[hotkey],
                        flops=scored.flops,
                        correctness=scored.correctness,
                        timeliness=scored.timeliness,
                        missed=[name for name in ("root", "evidence", "bitmap") if not getattr(kept, name)],
                        scarcity=scored.scarcity,
                        score=scored.value,
                        mean=mean.value,
                        rounds=mean.rounds,
                        share=round(shares.get(hotkey, 0.0), 6),
                        burn=manifest.score.burn,
                        weight=round(by_uid.get(uids[hotkey], 0.0), 6),
                    )
                )
        await asyncio.to_thread(self.suspicions.keep)
        await asyncio.to_thread(self._memory.keep, self._history.past)
        await self._set(roster.round, closed.cut, by_uid)

    def _fell(self, hotkey: str, number: int) -> bool:
        held = self.suspicions.of(hotkey)
        return number in _fallen(held)

    def _payable(self, closed: Closed, evidence: Mapping[str, Evidence]) -> dict[str, set[int]]:
        """Windows of each miner that most of the stake at work acknowledged in time, or this validator."""
        found = {}
        for hotkey, table in evidence.items():
            digests = chain(table.heads)
            sound = [
                ack
                for ack in table.acks
                if ack.validator in closed.stakes
                and ack.count < len(digests)
                and verify(
                    ack.validator,
                    ack_message(
                        self._node.loaded.run_id,
                        closed.roster.round,
                        hotkey=hotkey,
                        count=ack.count,
                        digest=digests[ack.count],
                        slot=ack.slot,
                    ),
                    ack.signature,
                )
            ]
            most = acknowledged(table.heads, sound, closed.stakes)
            me = self._node.identity.hotkey
            mine = acknowledged(table.heads, [ack for ack in sound if ack.validator == me], {me: 1.0})
            found[hotkey] = {
                head.version
                for head, theirs, own in zip(table.heads, most, mine, strict=True)
                if (theirs or own) and head.slot < closed.slots
            }
        return found

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
