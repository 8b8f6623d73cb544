"""What a closed round comes to from public evidence alone: who is paid for what, and every term of the scores.

A validator computes it with what its own audits found, a doubter with what validators report; the rest is the chain and
the miners' tables, so both get the same terms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from model.split import StagePlan
from neurons.bench import forward_flops
from neurons.telemetry import MinerScored
from subnet.identity import verify
from subnet.manifest import LoadedManifest
from subnet.metagraph import ChainState
from subnet.swarm.record import Record
from subnet.swarm.roster import Roster, records_of
from subnet.trust.heads import ack_message, acknowledged, chain
from subnet.trust.ledger import Evidence
from subnet.trust.scoring import History, Kept, Score, marks_kept, scarcity, score
from subnet.trust.settlement import NOTHING, Settlement, settle


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


@dataclass(frozen=True, slots=True)
class Verdict:
    """Pay and marks of a round; `scores` adds who was right."""

    closed: Closed
    settlement: Settlement
    marks: Mapping[str, Kept]
    records: Mapping[str, Record | None]
    """At CUT."""
    forward_flops: Mapping[str, float]
    """Of one microbatch at each member's stage."""

    @classmethod
    def of(
        cls,
        loaded: LoadedManifest,
        plans: Sequence[StagePlan],
        closed: Closed,
        evidence: Mapping[str, Evidence],
        *,
        me: str,
    ) -> Verdict:
        """`evidence` is what members served that hashes to their roots. `me` trusts its own acknowledgements."""
        roster = closed.roster
        settlement = settle(
            loaded.run_id,
            roster,
            evidence,
            verify,
            first_sample=loaded.manifest.samples(roster.round).start,
            seed=closed.route_seed,
            lane=loaded.manifest.swarm.lane,
            windows=payable(loaded.run_id, closed, evidence, me=me),
        )
        records = records_of(closed.cut)
        costs = [forward_flops(loaded.manifest, plan) for plan in plans]
        return cls(
            closed=closed,
            settlement=settlement,
            marks=marks_kept(roster, records, records_of(closed.have), served=evidence),
            records=records,
            forward_flops={hotkey: costs[stage] for stage, names in enumerate(roster.stages) for hotkey in names},
        )

    def scores(self, correctness: Mapping[str, float], *, cap: float) -> dict[str, Score]:
        """Of every active member; `cap` is the manifest's on scarcity."""
        return score(
            self.settlement,
            forward_flops=self.forward_flops,
            correctness=correctness,
            timeliness={hotkey: mark.share for hotkey, mark in self.marks.items()},
            scarcity=scarcity(self.closed.roster, cap=cap),
        )

    def explained(
        self, scored: Score, history: History, shares: Mapping[str, float], *, uid: int, burn: float, weight: float
    ) -> MinerScored:
        """Every term of one member's score, as the event log has it."""
        hotkey = scored.hotkey
        paid, record, kept = self.settlement.paid.get(hotkey, NOTHING), self.records.get(hotkey), self.marks[hotkey]
        mean = history.mean(hotkey)
        return MinerScored(
            round=self.closed.roster.round,
            uid=uid,
            hotkey=hotkey,
            stage=self.closed.roster.stage_of(hotkey) or 0,
            root=record.root.hex() if record is not None and kept.root else "",
            cut=self.closed.cut.head.number,
            claimed=paid.claimed,
            units=paid.units,
            forward=paid.forward,
            backward=paid.backward,
            unpaid={reason.value: count for reason, count in paid.unpaid.items()},
            forward_flops=self.forward_flops[hotkey],
            flops=scored.flops,
            correctness=scored.correctness,
            timeliness=scored.timeliness,
            missed=[name for name in ("root", "evidence", "bitmap") if not getattr(kept, name)],
            scarcity=scored.scarcity,
            score=scored.value,
            mean=mean.value,
            rounds=mean.rounds,
            share=round(shares.get(hotkey, 0.0), 6),
            burn=burn,
            weight=round(weight, 6),
        )


def payable(run: bytes, closed: Closed, evidence: Mapping[str, Evidence], *, me: str) -> dict[str, set[int]]:
    """Windows of each miner that most of the stake at work acknowledged in time, or `me`."""
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
                    run,
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
        mine = acknowledged(table.heads, [ack for ack in sound if ack.validator == me], {me: 1.0})
        found[hotkey] = {
            head.version
            for head, theirs, own in zip(table.heads, most, mine, strict=True)
            if (theirs or own) and head.slot < closed.slots
        }
    return found
