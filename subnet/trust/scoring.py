"""Scoring: from what is settled and what audits found to weights, every term named, recomputable by anyone.

    score = verified useful FLOPs x correctness x timeliness x scarcity

* FLOPs of the units that pay (`subnet.trust.settlement`): a forward counts once its stage's cost, a backward twice;
  recompute is not paid.
* correctness is 0 or 1, by the audits.
* timeliness, in [0, 1], is the share of the round's three marks kept (`Kept`).
* scarcity, at least 1 and at most the manifest's, rewards those who came to a stage that has too few replicas.

A miner's mean is taken over the last closed rounds; its weight is its share of all means, after the burn. Once a
hotkey has been seen, every later round counts for it, as 0 where it was nowhere. A conviction makes it 0 in that round,
in all before, and in as many from then on as a mean is taken over. So silence is never better than failure: a round in
which nothing was shown is worth what a failed one is, and who shows nothing once its root is on chain is treated as
convicted by whoever asked. A miner may still give a round up before its root is there, when it sees what is drawn; that
costs the whole round, and the draw hits with at least the cheated share, so it loses that share of its pay to save as
much of the work.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from subnet.swarm.record import Phase, Record
from subnet.swarm.roster import Roster
from subnet.trust.settlement import NOTHING, Settlement

EARLIEST, LATEST = 30, 20
"""Blocks before an epoch between which weights are set: late enough to know the newest round, and early enough to be
included whatever the chain's load."""


@dataclass(frozen=True, slots=True)
class Kept:
    """Which of a round's marks a miner kept."""

    root: bool
    """Its record fixed a root by CUT."""
    evidence: bool
    """It served what hashes to that root, in time."""
    bitmap: bool
    """Its record said by HAVE which payloads it holds, still under that root."""

    @property
    def share(self) -> float:
        """Without root or evidence no unit pays, so among those paid this is 1 or 2/3."""
        return (self.root + self.evidence + self.bitmap) / 3


def marks_kept(
    roster: Roster,
    at_cut: Mapping[str, Record | None],
    at_have: Mapping[str, Record | None],
    *,
    served: Collection[str],
) -> dict[str, Kept]:
    """For every member of the roster, from the records at its CUT and HAVE blocks.

    `served` are those whose evidence came in time and matched its root.
    """
    marks = {}
    for hotkey in roster.members:
        cut, have = at_cut.get(hotkey), at_have.get(hotkey)
        root = cut is not None and cut.fixes(roster.round)
        bitmap = (
            root
            and cut is not None
            and have is not None
            and have.round == roster.round
            and have.phase >= Phase.HAVE
            and have.root == cut.root
        )
        marks[hotkey] = Kept(root, root and hotkey in served, bitmap)
    return marks


def scarcity(roster: Roster, *, cap: float) -> dict[str, float]:
    """The premium of every member: 1 + (cap - 1) x the share of replicas that its stage lacks.

    A stage's target is the mean over stages. Only those get a premium who were sent there after the run's first roster,
    as newcomers or from another stage: nobody chooses its stage, so nobody can seek it.
    """
    target = len(roster.members) / max(1, len(roster.stages))
    premium = {}
    for stage in roster.stages:
        lacking = max(0.0, 1.0 - len(stage) / target) if target else 0.0
        for hotkey in stage:
            member = roster.member(hotkey)
            moved = member is not None and member.since > 0
            premium[hotkey] = 1.0 + (cap - 1.0) * lacking if moved else 1.0
    return premium


@dataclass(frozen=True, slots=True)
class Score:
    """One miner's score in one round, term by term."""

    hotkey: str
    flops: float
    """Forward and backward FLOPs of its paid units; recompute is not paid."""
    correctness: float
    timeliness: float
    scarcity: float

    @property
    def value(self) -> float:
        return self.flops * self.correctness * self.timeliness * self.scarcity


def score(
    settlement: Settlement,
    *,
    forward_flops: Mapping[str, float],
    correctness: Mapping[str, float],
    timeliness: Mapping[str, float],
    scarcity: Mapping[str, float],
) -> dict[str, Score]:
    """Scores of a round, for every member of its roster: who served no evidence earned nothing.

    `forward_flops` is a member's stage's forward cost of one microbatch; a backward counts twice that. Who was not
    audited is correct; the other terms are there for all members.
    """
    scores = {}
    for hotkey in forward_flops:
        paid = settlement.paid.get(hotkey, NOTHING)
        flops = (paid.forward + 2.0 * paid.backward) * forward_flops[hotkey]
        scores[hotkey] = Score(hotkey, flops, correctness.get(hotkey, 1.0), timeliness[hotkey], scarcity[hotkey])
    return scores


@dataclass(frozen=True, slots=True)
class Mean:
    """A miner's mean score and over how many rounds it is taken."""

    value: float
    rounds: int


@dataclass(frozen=True, slots=True)
class Past:
    """What a history remembers: plain values, so pydantic's `TypeAdapter(Past)` writes and reads it."""

    recent: tuple[Mapping[str, Score], ...] = ()
    """Scores of the last closed rounds, oldest first."""
    count: int = 0
    """Closed rounds."""
    first: Mapping[str, int] = field(default_factory=dict)
    """Index of the closed round in which a hotkey was first seen."""
    clean: Mapping[str, int] = field(default_factory=dict)
    """Index of the first closed round that counts again for one that was convicted."""


class History:
    """The closed rounds of a run as one validator judged them, as far as weights depend on them."""

    def __init__(self, rounds: int, past: Past | None = None) -> None:
        """`rounds` is over how many a mean is taken, and for how many a conviction counts."""
        past = past or Past()
        self._rounds = rounds
        self._recent = deque(past.recent, maxlen=rounds)
        self._count = past.count
        self._first = dict(past.first)
        self._clean = dict(past.clean)

    @property
    def past(self) -> Past:
        """What the next process needs to go on."""
        return Past(tuple(self._recent), self._count, dict(self._first), dict(self._clean))

    def barred(self, hotkey: str) -> bool:
        """Whether the round that is closed next counts nothing for it, because of an earlier conviction."""
        return self._count < self._clean.get(hotkey, 0)

    def close(self, scores: Mapping[str, Score], convicted: Collection[str] = ()) -> dict[str, Score]:
        """Enter a round, with who was convicted in it; its scores as they count."""
        for hotkey in convicted:
            self._clean[hotkey] = self._count + self._rounds
        counted = {
            hotkey: replace(entry, correctness=0.0) if self.barred(hotkey) else entry
            for hotkey, entry in scores.items()
        }
        for hotkey in counted:
            self._first.setdefault(hotkey, self._count)
        self._recent.append(counted)
        self._count += 1
        return counted

    def mean(self, hotkey: str) -> Mean:
        """Over the last closed rounds; a newcomer's over those since it was first seen."""
        oldest = self._count - len(self._recent)
        begin = max(oldest, self._first.get(hotkey, self._count))
        if begin == self._count:
            return Mean(0.0, 0)
        clean = self._clean.get(hotkey, 0)
        counted = [
            entry.value
            for index, scores in enumerate(self._recent, start=oldest)
            if index >= clean and (entry := scores.get(hotkey)) is not None
        ]
        return Mean(sum(counted) / (self._count - begin), self._count - begin)

    def shares(self) -> dict[str, float]:
        """Every miner's part of all means; those that have one, in hotkey order. Empty if nobody has."""
        means = {hotkey: self.mean(hotkey).value for hotkey in sorted(self._first)}
        total = sum(means.values())
        return {hotkey: value / total for hotkey, value in means.items() if value > 0} if total > 0 else {}


def weights(shares: Mapping[str, float], *, uids: Mapping[str, int], burn: float, owner: str) -> dict[int, float]:
    """Weights to set, by uid, summing to 1: the burn uid, the subnet owner's, gets `burn`, the miners the rest.

    Who is no longer registered gets nothing; the others share it. With nobody eligible everything is burned. If the
    owner's hotkey is not registered there is no burn uid: then the miners get all, and with nobody eligible either
    there is nothing to set, so the result is empty and what is on chain stays.
    """
    eligible = {uids[hotkey]: share for hotkey, share in shares.items() if hotkey in uids and share > 0}
    total = sum(eligible.values())
    sink = uids.get(owner)
    if not eligible:
        return {} if sink is None else {sink: 1.0}
    kept = 1.0 if sink is None else 1.0 - burn
    result = {uid: kept * share / total for uid, share in eligible.items()}
    if sink is not None and burn > 0:
        result[sink] = result.get(sink, 0.0) + burn
    return result


def due(now: int, *, epoch: int, tempo: int, last: int | None) -> int:
    """The block, `now` or later, at which to set weights next: once per tempo, shortly before the epoch.

    Args:
        now: the newest block.
        epoch: the next epoch's block, later than `now`.
        tempo: blocks between epochs. One so short that it has no room for the span before its end asks for weights
            at once, each time something is new: so on a local chain.
        last: the block at which this validator set its weights last. Late is better than not at all.
    """
    if tempo <= EARLIEST:
        return now
    middle = epoch - (EARLIEST + LATEST) // 2
    if last is not None and last > epoch - tempo:
        return middle + tempo
    return middle if now < epoch - EARLIEST else now
