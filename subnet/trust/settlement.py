"""Settlement: which units of a round count, and why the others do not.

A microbatch counts once, along one *pathway*: the one that came back to its head, followed from there to the tail. At
each stage the one before names whose gradient it took; where it is silent, or says what nobody confirms, its signature
says it. Then forward units are found from the tail to the head the same way. At most one unit per stage, sample and
direction is on a pathway. A unit on it *pays* if

* its sample is its head's to train (or was taken over from a head that served no evidence),
* what came in is what its neighbour's leaf says it sent,
* the consumer of its output signed for it,
* its window was acknowledged in time, and
* the head or body that sent it on kept to the routing lottery (below).

Whoever served no evidence earns nothing and contradicts nobody: there the receipts of its neighbours speak. A stage at
which nobody speaks of a sample can be passed only if a replica there signed for what was sent to it.

*Colluders.* Two, three or more neighbours can sign each other's receipts, but while one stage of a pathway is honest
and served its evidence they gain nothing: what they invent did not come back to a head from the tail, and what others
did is on a pathway already. Whom a friend names in an honest replica's place gets its unit only if the friend signs
for both, and both leaves then prove it (`Settlement.findings`): an honest consumer signs for one producer of a unit.
Three things are not seen here: all stages of a pathway together invent it whole; any replica can send rubbish on, which
honest ones then work on; and who takes an output, uses it and never signs for it can name a friend. Replays and the
data audit draw such units like any others, but in the last case they pass: senders should avoid who does not sign.

*Off the plan.* The lottery (`subnet.swarm.routing.hops`) says whom a sender should hand each microbatch. A BUSY or
frozen replica makes honest senders go elsewhere, and does so to all of them; self-dealing is one sender's. So a sender
may go elsewhere with `OFF_PLAN_SHARE` of its microbatches, and besides with `EXCUSE` times the share that the lower
median of the other senders took away from the same replica. What goes beyond pays its *sender* nothing: who received it
did what it was asked. So a deal costs its sender what it brings the friend: nothing is gained but on the free share. Up
to half of the senders of a stage cannot excuse each other, and a saturated replica loses nothing by what is taken from
it, because others wait at its door. A link broken between two replicas looks the same as a deal and costs the sender at
most 1/n - OFF_PLAN_SHARE of its pay. Nothing is held against a sender who is alone, or for a replica without evidence.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from subnet.swarm.roster import Roster
from subnet.swarm.routing import head_of, hops
from subnet.trust.finding import Check, Finding, Grade
from subnet.trust.ledger import NO_RECEIPT, Direction, Evidence, Leaf, receipt_message

Verify = Callable[[str, bytes, bytes], bool]
"""(hotkey, message, signature) -> whether the signature is the hotkey's."""

OFF_PLAN_SHARE = 0.1
"""Of a sender's microbatches: what may go elsewhere than planned without an excuse."""
EXCUSE = 2.0
"""Times the share that others took away from a replica: what a sender may take away from it. Two, because both are
counts of few."""


class Unpaid(StrEnum):
    """Why a unit does not count: the first that applies, in this order."""

    NOT_ASSIGNED = "not assigned"
    """A head's sample that is another's."""
    NOT_COMPLETED = "not completed"
    """Its microbatch cannot be followed from the head it came back to as far as the tail."""
    CONTRADICTED = "contradicted"
    """Its consumer, or the pathway that came back, has another's unit in its place."""
    UNLINKED = "unlinked"
    """What came in is not what its neighbour says it sent."""
    NO_RECEIPT = "no receipt"
    NOT_ACKNOWLEDGED = "window not acknowledged"
    OFF_PLAN = "sent off the plan"


@dataclass(frozen=True, slots=True)
class Paid:
    """Units of one miner in one round that count."""

    forward: int
    backward: int
    claimed: int
    """Leaves in its evidence, paid or not."""
    unpaid: Mapping[Unpaid, int] = field(default_factory=dict)
    """The others by reason."""

    @property
    def units(self) -> int:
        return self.forward + self.backward


NOTHING = Paid(0, 0, 0)


@dataclass(frozen=True, slots=True)
class Pathway:
    """Who a completed microbatch went through, head first, and the loss its tail reported."""

    sample: int
    hotkeys: tuple[str, ...]
    loss: float


@dataclass(frozen=True, slots=True)
class Settlement:
    paid: dict[str, Paid]
    """Of all whose evidence was there."""
    pathways: tuple[Pathway, ...]
    """Those of which every stage's evidence was there."""
    findings: tuple[Finding, ...]
    """Proofs against those who signed for two replicas' outputs of one unit."""


@dataclass(frozen=True, slots=True)
class _Place:
    """Who did a microbatch at one stage. `hotkey` is None if all that is known is that a replica without evidence must
    have; `leaf` is None where there is no word of it."""

    hotkey: str | None
    leaf: Leaf | None


_SILENT = _Place(None, None)
_Claims = Mapping[str, Leaf]
"""Leaves of one stage, sample and direction, by who claims it, in roster order."""


@dataclass(frozen=True, slots=True)
class _Track:
    """One completed microbatch: who did the backward at every stage, and the forward at all but the tail."""

    backward: tuple[_Place, ...]
    forward: tuple[_Place, ...]

    def has(self, hotkey: str, leaf: Leaf) -> bool:
        places = self.forward if leaf.direction is Direction.FORWARD else self.backward
        return leaf.stage < len(places) and places[leaf.stage] == _Place(hotkey, leaf)


class _Book:
    """Leaves of all miners of a round, with the neighbours' view of each."""

    def __init__(
        self, run: bytes, roster: Roster, evidence: Mapping[str, Evidence], verify: Verify, first_sample: int
    ) -> None:
        self.run, self.roster, self.verify, self.first_sample = run, roster, verify, first_sample
        self.tail = len(roster.stages) - 1
        self.spoke = frozenset(evidence)
        self.units: dict[str, tuple[Leaf, ...]] = {}
        self._claims: dict[tuple[int, int, Direction], dict[str, Leaf]] = defaultdict(dict)
        for hotkey in (hotkey for stage in roster.stages for hotkey in stage if hotkey in evidence):
            stage = roster.stage_of(hotkey)
            own = {leaf.key: leaf for leaf in evidence[hotkey].leaves if leaf.stage == stage}
            self.units[hotkey] = tuple(own.values())
            for leaf in own.values():
                self._claims[leaf.stage, leaf.sample, leaf.direction][hotkey] = leaf
        self._signed: dict[tuple[str, Direction, int], bool] = {}

    def claims(self, stage: int, sample: int, direction: Direction) -> _Claims:
        return self._claims.get((stage, sample, direction), {})

    def samples(self) -> set[int]:
        return {sample for _, sample, _ in self._claims}

    def peer(self, stage: int, index: int) -> str | None:
        if not 0 <= stage <= self.tail or index >= len(self.roster.stages[stage]):
            return None
        return self.roster.stages[stage][index]

    def sink(self, leaf: Leaf) -> str | None:
        """Who took the unit's output, by its own leaf."""
        return self.peer(leaf.stage + (1 if leaf.direction is Direction.FORWARD else -1), leaf.sink)

    def silent(self, stage: int) -> Iterator[str]:
        """Replicas of the stage that served no evidence."""
        return (hotkey for hotkey in self.roster.stages[stage] if hotkey not in self.spoke)

    def signed(self, hotkey: str, leaf: Leaf) -> bool:
        """Whether the sink signed for this unit's output."""
        key = (hotkey, leaf.direction, leaf.sample)
        if key not in self._signed:
            consumer = self.sink(leaf) if leaf.receipt != NO_RECEIPT else None
            self._signed[key] = consumer is not None and self.verify(
                consumer,
                receipt_message(
                    self.run, self.roster.round, producer=hotkey, key=leaf.key, stage=leaf.stage, output=leaf.output
                ),
                leaf.receipt,
            )
        return self._signed[key]

    # -- whose a sample is ----------------------------------------------------------------------------------------

    def owner(self, sample: int) -> str:
        heads = self.roster.stages[0]
        return heads[head_of(sample, base=self.first_sample, heads=len(heads))]

    def entitled(self, hotkey: str, leaf: Leaf) -> bool:
        """Whether a head may count a unit of this sample: its own, or one of a head that served no evidence, so that
        nobody can take a living head's pay, if the neighbour in the next stage did."""
        owner = self.owner(leaf.sample)
        neighbour = self.peer(1, leaf.sink if leaf.direction is Direction.FORWARD else leaf.source)
        return hotkey == owner or (owner not in self.spoke and neighbour in self.spoke)

    # -- from the head to the tail --------------------------------------------------------------------------------

    def track(self, sample: int) -> _Track | None:
        """The pathway of a microbatch that came back to its head, None if none can be followed as far as the tail."""
        place = self._head(sample)
        backward: list[_Place] = []
        while place is not None:
            backward.append(place)
            if len(backward) > self.tail:
                return _Track(tuple(backward), self._forwards(sample, backward))
            place = self._behind(len(backward), sample, place)
        return None

    def _head(self, sample: int) -> _Place | None:
        """Who has the gradient of a microbatch at the first stage, in its own words or by its receipt."""
        claims, owner = self.claims(0, sample, Direction.BACKWARD), self.owner(sample)
        if owner in self.spoke:
            sent = self.claims(0, sample, Direction.FORWARD).get(owner)
            started = self.tail == 0 or (sent is not None and self.signed(owner, sent))
            return _Place(owner, claims[owner]) if owner in claims and started else None
        behind = self.claims(1, sample, Direction.BACKWARD)
        for hotkey, leaf in claims.items():
            source = behind.get(self.peer(1, leaf.source) or "")
            if source is not None and self.entitled(hotkey, leaf) and self.sink(source) == hotkey:
                return _Place(hotkey, leaf)
        back = any(self.sink(leaf) not in self.spoke and self.signed(hotkey, leaf) for hotkey, leaf in behind.items())
        return _SILENT if back else None

    def _behind(self, stage: int, sample: int, ahead: _Place) -> _Place | None:
        """Who did the backward whose gradient `ahead`, one stage nearer to the head, took; None: nobody can have."""
        claims = self.claims(stage, sample, Direction.BACKWARD)
        named = None if ahead.leaf is None else self.peer(stage, ahead.leaf.source)
        wanted = None if ahead.leaf is None else ahead.leaf.gradient
        found = self._pick(claims, ahead, named, wanted)
        if found is not None:
            return found
        if named is not None and named not in claims and self.took_part(named, stage, sample):
            return _Place(named, None)
        if ahead.leaf is not None:
            # It has another gradient than anybody sent: then whom it signed for.
            return self._pick(claims, _Place(ahead.hotkey, None), None, None)
        # It took the gradient without signing and does not say from whom: not that one's fault.
        unsigned = next((hotkey for hotkey, leaf in claims.items() if leaf.receipt == NO_RECEIPT), None)
        if unsigned is not None:
            return _Place(unsigned, claims[unsigned])
        return _SILENT if any(self.took_part(hotkey, stage, sample) for hotkey in self.silent(stage)) else None

    def _pick(self, claims: _Claims, consumer: _Place, named: str | None, wanted: bytes | None) -> _Place | None:
        """Whose output the consumer took: whom it names or signed for, if it is what it says it took.

        Where it names one and signed for another, or signed for two, the one whom its neighbour on the other side knows
        goes first.
        """
        options = [
            hotkey
            for hotkey, leaf in claims.items()
            if wanted in (None, leaf.output)
            and (
                (hotkey == named and wanted is not None)
                or (self._went_to(leaf, consumer) and self.signed(hotkey, leaf))
            )
        ]
        best = max(options, key=lambda hotkey: (self._known(hotkey, claims[hotkey]), hotkey == named), default=None)
        return None if best is None else _Place(best, claims[best])

    def _known(self, hotkey: str, leaf: Leaf) -> bool:
        """Whether who sent this unit what came in says so."""
        forward = leaf.direction is Direction.FORWARD
        if forward and leaf.stage == 0:
            return hotkey == self.owner(leaf.sample)
        upstream = forward or leaf.stage == self.tail
        stage = leaf.stage + (-1 if upstream else 1)
        sent = self.claims(stage, leaf.sample, Direction.FORWARD if upstream else Direction.BACKWARD)
        sender = self.peer(stage, leaf.source)
        return sender is not None and sender in sent and self.sink(sent[sender]) == hotkey

    def _went_to(self, leaf: Leaf, consumer: _Place) -> bool:
        sink = self.sink(leaf)
        return sink == consumer.hotkey if consumer.hotkey is not None else sink not in self.spoke

    def took_part(self, hotkey: str, stage: int, sample: int) -> bool:
        """Whether a replica without a word of the sample had it: it signed for the activation, as far as is known."""
        if stage == 0:
            return False
        sent = self.claims(stage - 1, sample, Direction.FORWARD)
        if any(self.sink(leaf) == hotkey and self.signed(sender, leaf) for sender, leaf in sent.items()):
            return True
        return hotkey not in self.spoke and any(self.silent(stage - 1))

    # -- from the tail to the head --------------------------------------------------------------------------------

    def _forwards(self, sample: int, backward: list[_Place]) -> tuple[_Place, ...]:
        places: list[_Place] = []
        consumer = backward[self.tail]
        for stage in reversed(range(self.tail)):
            consumer = self._sender(stage, sample, consumer, backward[stage + 1])
            places.append(consumer)
        return tuple(reversed(places))

    def _sender(self, stage: int, sample: int, consumer: _Place, holder: _Place) -> _Place:
        """Who did the forward whose output `consumer` took. `holder` did the backward there: if it took that over, its
        input is the same, whoever it had that from."""
        claims = self.claims(stage, sample, Direction.FORWARD)
        named = None if consumer.leaf is None else self.peer(stage, consumer.leaf.source)
        wanted = None if consumer.leaf is None else consumer.leaf.input
        found = self._pick(claims, consumer, named, wanted)
        if found is not None:
            return found
        if (
            named is not None
            and named not in claims
            and (named not in self.spoke or self.took_part(named, stage, sample))
        ):
            return _Place(named, None)
        if holder.leaf is not None:
            used = [hotkey for hotkey in claims if claims[hotkey].output == holder.leaf.input]
            used = [hotkey for hotkey in used if self.signed(hotkey, claims[hotkey])]
            # Whose output went to one that is silent, or to the holder, before who has another's signature.
            used.sort(key=lambda hotkey: self.sink(claims[hotkey]) in self.spoke - {holder.hotkey})
            if used:
                return _Place(used[0], claims[used[0]])
        return self._pick(claims, _Place(consumer.hotkey, None), None, None) or _SILENT

    # -- who signed twice -----------------------------------------------------------------------------------------

    def forked(self) -> Iterator[Finding]:
        """Consumers that signed for one unit of two producers, by these' leaves: what an honest one never does, because
        it answers the second without a receipt. One finding per replica."""
        seen: set[str] = set()
        for (stage, sample, direction), claims in self._claims.items():
            if len(claims) < 2:
                continue
            signers = Counter(self.sink(leaf) for hotkey, leaf in claims.items() if self.signed(hotkey, leaf))
            for signer, count in signers.items():
                if signer is None or count < 2 or signer in seen:
                    continue
                seen.add(signer)
                yield Finding(
                    hotkey=signer,
                    round=self.roster.round,
                    stage=self.roster.stage_of(signer) or 0,
                    check=Check.RECEIPT,
                    grade=Grade.PROOF,
                    passed=False,
                    error=math.inf,
                    sample=sample,
                    reason=f"signed for the {direction.name.lower()} of {count} replicas of stage {stage}",
                )

    # -- one unit -------------------------------------------------------------------------------------------------

    def fault(self, hotkey: str, leaf: Leaf, track: _Track | None) -> Unpaid | None:
        """Why the unit does not count, as far as its own microbatch says; None if it does."""
        if leaf.stage == 0 and not self.entitled(hotkey, leaf):
            return Unpaid.NOT_ASSIGNED
        if track is None:
            return Unpaid.NOT_COMPLETED
        if not track.has(hotkey, leaf):
            return Unpaid.NO_RECEIPT if leaf.receipt == NO_RECEIPT else Unpaid.CONTRADICTED
        if not (self._fed(leaf) and self._returned(hotkey, leaf)):
            return Unpaid.UNLINKED
        ends = leaf.stage == 0 and leaf.direction is Direction.BACKWARD
        return None if ends or self.signed(hotkey, leaf) else Unpaid.NO_RECEIPT

    def _fed(self, leaf: Leaf) -> bool:
        """Whether the activation that came in is one that the stage before says it sent. A body's backward may have
        fetched it to take over a dead sibling's unit, so there the digest decides."""
        if leaf.stage == 0:
            return True
        stage = leaf.stage - 1
        sent = self.claims(stage, leaf.sample, Direction.FORWARD)
        if leaf.direction is Direction.BACKWARD and leaf.stage < self.tail:
            senders = self.roster.stages[stage]
        else:
            sender = self.peer(stage, leaf.source)
            senders = () if sender is None else (sender,)
        return any(
            sent[sender].output == leaf.input
            if sender in sent and (sent[sender].output == leaf.input or self.signed(sender, sent[sender]))
            else sender not in self.spoke or self.took_part(sender, stage, leaf.sample)
            for sender in senders
        )

    def _returned(self, hotkey: str, leaf: Leaf) -> bool:
        """Whether the gradient that came in is the one that the stage behind says it sent here. One that says nothing,
        or what nobody signed for, must at least have taken the activation."""
        if leaf.direction is Direction.FORWARD or leaf.stage == self.tail:
            return True
        sender = self.peer(leaf.stage + 1, leaf.source)
        if sender is None:
            return False
        sent = self.claims(leaf.stage + 1, leaf.sample, Direction.BACKWARD).get(sender)
        if sent is not None and sent.output == leaf.gradient:
            return self.sink(sent) == hotkey
        if sent is not None and self.signed(sender, sent):
            return False
        return self.took_part(sender, leaf.stage + 1, leaf.sample)


def settle(
    run: bytes,
    roster: Roster,
    evidence: Mapping[str, Evidence],
    verify: Verify,
    *,
    first_sample: int,
    seed: bytes,
    lane: int,
    windows: Mapping[str, Collection[int]],
) -> Settlement:
    """Which units of a round count, per miner, and the pathways they form.

    Args:
        evidence: the tables that were served, matched their root on chain and passed `Evidence.check`; miners missing
            from it earn nothing.
        first_sample: the round's first sample id: it decides which head each sample belongs to.
        seed: of the round's routing lottery.
        lane: microbatches between two of its draws.
        windows: by hotkey, the versions whose heads were acknowledged in time (`subnet.trust.heads.acknowledged`).
    """
    book = _Book(run, roster, evidence, verify, first_sample)
    tracks = {sample: book.track(sample) for sample in sorted(book.samples())}
    astray = _off_plan(book, tracks, seed, lane)
    paid = {}
    for hotkey, leaves in book.units.items():
        counts, unpaid = Counter[Direction](), Counter[Unpaid]()
        for leaf in leaves:
            fault = book.fault(hotkey, leaf, tracks[leaf.sample])
            if fault is None and leaf.version not in windows.get(hotkey, ()):
                fault = Unpaid.NOT_ACKNOWLEDGED
            if fault is None and (hotkey, leaf.sample) in astray:
                fault = Unpaid.OFF_PLAN
            if fault is None:
                counts[leaf.direction] += 1
            else:
                unpaid[fault] += 1
        paid[hotkey] = Paid(
            counts[Direction.FORWARD],
            counts[Direction.BACKWARD],
            len(leaves),
            {reason: unpaid[reason] for reason in Unpaid if unpaid[reason]},
        )
    return Settlement(paid, tuple(_pathways(tracks)), tuple(book.forked()))


def _pathways(tracks: Mapping[int, _Track | None]) -> Iterator[Pathway]:
    for sample, track in tracks.items():
        places = track.backward if track is not None else ()
        hotkeys = tuple(place.hotkey for place in places if place.hotkey is not None and place.leaf is not None)
        last = places[-1].leaf if places else None
        if last is not None and len(hotkeys) == len(places):
            yield Pathway(sample, hotkeys, last.loss)


@dataclass(frozen=True, slots=True)
class _Hop:
    """One microbatch that a replica with evidence sent on, and whether it went where the lottery says."""

    sample: int
    planned: str
    kept: bool


def _off_plan(book: _Book, tracks: Mapping[int, _Track | None], seed: bytes, lane: int) -> set[tuple[str, int]]:
    """(sender, sample) of the microbatches that were sent elsewhere than planned, beyond what is allowed."""
    sent = _by_sender(book, tracks, seed, lane)
    took = {  # share that went elsewhere, by sender and planned receiver
        sender: {planned: sum(not hop.kept for hop in meant) / len(meant) for planned, meant in _by_plan(own).items()}
        for sender, own in sent.items()
    }
    excess: set[tuple[str, int]] = set()
    for sender, own in sent.items():
        siblings = set(book.roster.stages[book.roster.stage_of(sender) or 0]) - {sender}
        unexcused: list[int] = []
        for planned, meant in _by_plan(own).items():
            shares = sorted(took[other][planned] for other in siblings if planned in took.get(other, ()))
            excuse = EXCUSE * len(meant) * shares[(len(shares) - 1) // 2] if shares else len(meant)
            gone = [hop.sample for hop in meant if not hop.kept]
            unexcused += gone[math.ceil(excuse) :]
        free = math.ceil(OFF_PLAN_SHARE * len(own))
        excess.update((sender, sample) for sample in sorted(unexcused)[free:])
    return excess


def _by_sender(book: _Book, tracks: Mapping[int, _Track | None], seed: bytes, lane: int) -> dict[str, list[_Hop]]:
    """What each replica sent on, in the order of the samples; not what was meant for who served no evidence."""
    plan = _planner(book, seed, lane)
    sent: dict[str, list[_Hop]] = defaultdict(list)
    for sample, track in tracks.items():
        for stage, place in enumerate(track.forward if track is not None else ()):
            planned = plan(sample, stage + 1)
            if track is None or place.hotkey is None or place.leaf is None or planned not in book.spoke:
                continue
            did = {places[stage + 1].hotkey for places in (track.backward, track.forward) if stage + 1 < len(places)}
            sent[place.hotkey].append(_Hop(sample, planned, planned in did | {book.sink(place.leaf)}))
    return sent


def _by_plan(sent: list[_Hop]) -> dict[str, list[_Hop]]:
    by: dict[str, list[_Hop]] = defaultdict(list)
    for hop in sent:
        by[hop.planned].append(hop)
    return by


def _planner(book: _Book, seed: bytes, lane: int) -> Callable[[int, int], str]:
    """(sample, stage) -> who should do it there."""
    stages = book.roster.stages
    heads = len(stages[0])

    def plan(sample: int, stage: int) -> str:
        index, head = divmod(sample - book.first_sample, heads)
        return hops(stages[stage], seed=seed, stage=stage, head=head, heads=heads, index=index, lane=lane)[0]

    return plan
