"""The roster's recurrence: R_r = f(R_{r-1}, state at the first block of round r, outcome of a closed round).

    OUT → WAIT → JOIN(stage) → ACTIVE(stage) → BENCH(until) → WAIT

* Not valid, or leaving → OUT. Who has strikes and goes away waits them out on the bench first, one after the other.
* ACTIVE and twice in a row in no accepted source list (a live record, dead work) → BENCH for 2^strikes rounds. In a
  void round nobody is charged, except who cast no vote while at least half of all the run's replicas did: the chain
  took votes then, and with two replicas one that withholds its bitmap could otherwise void every round unpunished.
  The last replica of a stage is benched only if it cast no vote. Strikes are forgotten after four times their bench in
  one place.
* Whom validators with more than half of the stake at work hold convicted (`observers.condemned`) → BENCH, and stays
  there as long as they do; unless a stage would be left without a replica, which would stop everybody.
* A stage's *anchor* is the public state that counts: what most of its replicas held, by their own records, at the HAVE
  block of the closed round. That block is chosen because at no other are all of them between the same two merges.
  Votes for the state at that round's start go before older ones, so a stuck replica holds nobody up; a tie goes to
  the group whose eldest has counted longest.
* ACTIVE with another state than the anchor → JOIN at the same stage.
* JOIN → ACTIVE once its record says the anchor, or what most of the replicas that are further than the anchor say at
  this block; not within two rounds → BENCH, if a replica that voted was there to fetch from.
* WAIT, in the order of H(block hash ‖ hotkey), fills the stage with the fewest holders (JOIN and ACTIVE); the lowest
  stage breaks ties; at most max(1, ACTIVE) join a stage at once.
* A stage with fewer than two holders pulls one per refresh from the fullest that has at least two more: a joiner if
  there is one, else the ACTIVE with the lowest hash, who works on where it is for one round (`moving`) and changes to
  JOIN at the next refresh if the move is still needed; at once if the target has no ACTIVE. A record speaks of one
  stage only, so readiness for another cannot be seen while a replica works. Every pull makes the stages more equal
  and a newcomer in between cancels it, so moves are bounded by deaths.
* A stage without ACTIVE is *dark*. Its anchor stays, and whoever returns with that state counts at once. If those who
  join it cannot take it over at two refreshes, the newest state that one of them holds becomes the anchor (its record
  must carry the digest of the roster in which it joined); if they hold none, the stage starts from the seed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from subnet.metagraph import ChainState
from subnet.swarm.merge import accepted, cut_sources
from subnet.swarm.observers import condemned
from subnet.swarm.record import MAX_HAVE, Phase, Record
from subnet.swarm.roster import (
    FROM_SEED,
    NO_WEIGHTS,
    Anchor,
    Member,
    Roster,
    Standing,
    defect,
    in_order,
    records_of,
)

MISSES = 2
"""Closed rounds in a row in no source list that bench a replica."""
JOIN_ROUNDS = 2
MAX_STRIKES = 6
"""The longest bench is 2^6 rounds."""
FORGIVEN_AFTER = 4
"""Times the last bench that a replica must have counted for its strikes to be forgotten."""
FEW = 2
"""A stage with fewer holders pulls from the fullest."""
DARK_REFRESHES = 2


@dataclass(frozen=True, slots=True)
class Closed:
    """What the chain says of one closed round; see `close`."""

    round: int
    replicas: int
    """Of all stages."""
    listed: tuple[frozenset[str] | None, ...]
    """The accepted source list by stage; None where the round was void."""
    voted: frozenset[str]
    """Who had a bitmap on chain in time."""
    claims: Mapping[str, Anchor]
    """The public state each replica held, by its record at the HAVE block."""

    def charged(self, hotkey: str, stage: int) -> bool:
        """Whether the replica did not do its part."""
        listed = self.listed[stage]
        if listed is not None:
            return hotkey not in listed
        return hotkey not in self.voted and 2 * len(self.voted) >= self.replicas


@dataclass(frozen=True, slots=True)
class Refreshed:
    roster: Roster
    reasons: Mapping[str, str]
    """Why, for every hotkey that came to stand elsewhere, and for every neuron that is out."""


def close(roster: Roster, run: bytes, at_cut: ChainState, at_have: ChainState) -> Closed:
    """The outcome of `roster`'s round from the states at its CUT and HAVE blocks."""
    cut, have = records_of(at_cut), records_of(at_have)
    listed: list[frozenset[str] | None] = []
    voted: set[str] = set()
    for replicas in roster.stages:
        sources = cut_sources(replicas, cut, roster.round)
        names = frozenset(source.hotkey for source in accepted(sources, have, roster.round))
        listed.append(names or None)
        voted.update(
            source.hotkey
            for source in sources
            if (record := have.get(source.hotkey)) is not None
            and record.round == roster.round
            and record.phase >= Phase.HAVE
            and record.root == source.root
        )
    claims = {
        hotkey: Anchor(record.held, record.weights)
        for hotkey in roster.members
        if (record := have.get(hotkey)) is not None and record.run == run
    }
    return Closed(roster.round, len(roster.members), tuple(listed), frozenset(voted), claims)


def advance(
    previous: Roster,
    state: ChainState,
    run: bytes,
    *,
    fresh_from: int,
    closed: Closed | None,
    most: int = MAX_HAVE,
) -> Roster:
    """The next roster; `refresh` without the reasons."""
    return refresh(previous, state, run, fresh_from=fresh_from, closed=closed, most=most).roster


def refresh(
    previous: Roster,
    state: ChainState,
    run: bytes,
    *,
    fresh_from: int,
    closed: Closed | None,
    most: int = MAX_HAVE,
) -> Refreshed:
    """The roster of the round that begins at `state`'s block.

    fresh_from: first block of the round before; who has put no record on chain since is gone.
    closed: the newest round whose HAVE block is not after `state`; None if there is none yet.
    most: replicas that a stage may have, joiners included; at most the 64 of the have-bitmap.
    """
    return _Refresh(previous, state, run, fresh_from=fresh_from, closed=closed, most=most).run()


class _Refresh:
    """One step of the recurrence, on a table that is changed row by row."""

    def __init__(
        self, previous: Roster, state: ChainState, run: bytes, *, fresh_from: int, closed: Closed | None, most: int
    ) -> None:
        self._previous, self._state, self._closed, self._most = previous, state, closed, most
        self._round = previous.round + 1
        self._defects = {neuron.hotkey: defect(neuron, run, fresh_from=fresh_from) for neuron in state.neurons}
        self._records: dict[str, Record] = {
            hotkey: record
            for hotkey, record in records_of(state).items()
            if record is not None and not self._defects[hotkey]
        }
        self._rows: dict[str, Member] = {}
        self._anchors = list(previous.anchors)
        self._dark = list(previous.dark)
        self._reasons: dict[str, str] = {hotkey: f"out: {why}" for hotkey, why in self._defects.items() if why}
        self._condemned = condemned(state, run, fresh_from=fresh_from)

    def run(self) -> Refreshed:
        self._keep_the_valid()
        self._condemn()
        self._charge()
        for stage in range(len(self._anchors)):
            self._vote(stage)
            self._admit(stage)
            self._relight(stage)
        self._take_in()
        self._fill()
        self._balance()
        roster = Roster(
            round=self._round,
            table=tuple(self._rows[hotkey] for hotkey in sorted(self._rows)),
            anchors=tuple(self._anchors),
            dark=tuple(self._dark),
            block=self._state.head.number,
            parent=self._previous.digest,
        )
        return Refreshed(roster, self._reasons)

    # -- rows -----------------------------------------------------------------------------------------------------

    def _put(self, member: Member, standing: Standing, why: str, *, stage: int | None = None) -> None:
        """Change where a hotkey stands, from this round on."""
        self._rows[member.hotkey] = replace(
            member, standing=standing, stage=stage, since=self._round, missed=0, moving=None, until=0
        )
        self._reasons[member.hotkey] = why

    def _bench(self, member: Member, why: str) -> None:
        strikes = min(member.strikes + 1, MAX_STRIKES)
        self._put(member, Standing.BENCH, f"benched: {why}")
        until = self._round + 2**member.strikes
        self._rows[member.hotkey] = replace(self._rows[member.hotkey], strikes=strikes, until=until)

    def _at(self, stage: int, *standings: Standing) -> list[Member]:
        """The stage's members of these standings, in hotkey order."""
        return [
            self._rows[hotkey]
            for hotkey in sorted(self._rows)
            if self._rows[hotkey].stage == stage and self._rows[hotkey].standing in standings
        ]

    def _active(self, stage: int) -> list[Member]:
        return self._at(stage, Standing.ACTIVE)

    def _joining(self, stage: int) -> list[Member]:
        return self._at(stage, Standing.JOIN)

    def _holders(self, stage: int) -> int:
        return len(self._at(stage, Standing.ACTIVE, Standing.JOIN))

    def _claim(self, hotkey: str) -> Anchor:
        record = self._records[hotkey]
        return Anchor(record.held, record.weights)

    # -- who stays ------------------------------------------------------------------------------------------------

    def _keep_the_valid(self) -> None:
        """Rows of the registered only, so the table is never longer than the subnet."""
        for member in self._previous.table:
            why = self._defects.get(member.hotkey, "not registered")
            if member.hotkey not in self._defects:
                self._reasons[member.hotkey] = "out: not registered"
            elif member.standing is Standing.BENCH:
                still = not why and member.hotkey in self._condemned
                if still or self._round < member.until:
                    until = max(member.until, self._round + 1) if still else member.until
                    self._rows[member.hotkey] = replace(member, until=until)
                    self._reasons.pop(member.hotkey, None)
                elif not why:
                    self._put(member, Standing.WAIT, "its bench is over")
                elif member.strikes:
                    self._wait_out(member, why, strikes=member.strikes - 1)
            elif not why:
                self._rows[member.hotkey] = replace(member, moving=None)
            elif member.strikes:
                self._wait_out(member, why, strikes=member.strikes)

    def _wait_out(self, member: Member, why: str, *, strikes: int) -> None:
        """Who goes away keeps its strikes for as long as the next bench would be, and loses one each time."""
        self._put(member, Standing.BENCH, f"out: {why}; its {member.strikes} strikes are kept that long")
        until = self._round + 2**member.strikes
        self._rows[member.hotkey] = replace(self._rows[member.hotkey], until=until, strikes=strikes)

    def _condemn(self) -> None:
        why = "validators with most of the stake hold it convicted"
        for stage in range(len(self._anchors)):
            present = self._active(stage)
            named = [member for member in present if member.hotkey in self._condemned]
            if len(named) < len(present):
                for member in named:
                    self._bench(member, why)
        for member in list(self._rows.values()):
            if member.hotkey in self._condemned and member.standing in (Standing.WAIT, Standing.JOIN):
                self._bench(member, why)

    def _charge(self) -> None:
        closed = self._closed
        if closed is None:
            return
        for stage in range(len(self._anchors)):
            present = self._active(stage)
            dead = []
            for member in present:
                if member.since > closed.round:
                    continue
                listed = closed.listed[stage]
                missed = member.missed
                if closed.charged(member.hotkey, stage):
                    missed += 1
                elif listed is not None:
                    missed = 0
                served = self._round - member.since >= FORGIVEN_AFTER * 2**member.strikes
                strikes = 0 if served and missed == 0 else member.strikes
                self._rows[member.hotkey] = replace(member, missed=missed, strikes=strikes)
                if missed >= MISSES:
                    dead.append(self._rows[member.hotkey])
            for member in dead:
                if len(dead) < len(present) or member.hotkey not in closed.voted:
                    self._bench(member, f"in no source list of stage {stage} for {MISSES} rounds")

    # -- public states --------------------------------------------------------------------------------------------

    def _vote(self, stage: int) -> None:
        """The stage's anchor by what its replicas held when the closed round closed; others have to fetch it."""
        closed = self._closed
        if closed is None:
            return
        voters = [member for member in self._active(stage) if member.since <= closed.round]
        # Of a stage that has just died the last word counts: what was merged then need not be done again.
        last = [row for row in self._previous.table if row.stage == stage and row.standing is Standing.ACTIVE]
        witnesses = voters if self._active(stage) else [row for row in last if row.since <= closed.round]
        claims = {member.hotkey: closed.claims.get(member.hotkey, FROM_SEED) for member in witnesses}
        anchor = _elect(witnesses, claims, self._anchors[stage], closed.round)
        if anchor is None:
            return
        self._anchors[stage] = anchor
        for member in voters:
            if not _holds(claims[member.hotkey], anchor):
                held = claims[member.hotkey]
                self._put(
                    member,
                    Standing.JOIN,
                    f"held {_name(held)} in round {closed.round}, stage {stage} {_name(anchor)}",
                    stage=stage,
                )

    def _admit(self, stage: int) -> None:
        """Joiners who are ready count; those who took too long make room."""
        active = self._active(stage)
        sources = {member.hotkey for member in active} & (self._closed.voted if self._closed is not None else set())
        anchor = self._anchors[stage]
        targets = [anchor]
        said = [self._claim(member.hotkey) for member in active]
        newer = Counter(claim for claim in said if anchor.held < claim.held <= self._round)
        for claim, votes in newer.most_common(1):
            if votes * 2 > newer.total() and claim.weights != NO_WEIGHTS:
                targets.append(claim)
        for member in self._joining(stage):
            if member.since == self._round:
                continue
            claim = self._claim(member.hotkey)
            if claim in targets or (not active and _holds(claim, anchor)):
                self._put(member, Standing.ACTIVE, f"holds the state of stage {stage}", stage=stage)
            elif sources and self._round - member.since >= JOIN_ROUNDS:
                self._bench(member, f"not ready for stage {stage} within {JOIN_ROUNDS} rounds")

    def _relight(self, stage: int) -> None:
        """Restart a stage whose every replica is gone from the newest state that who joins it holds."""
        joiners = self._joining(stage)
        if self._active(stage) or not joiners:
            self._dark[stage] = 0 if self._active(stage) else self._dark[stage]
            return
        self._dark[stage] += 1
        if self._dark[stage] < DARK_REFRESHES:
            return
        found = Counter(
            claim
            for member in joiners
            if (claim := self._claim(member.hotkey)).weights != NO_WEIGHTS
            and claim.held <= self._round
            # Made in the knowledge of which stage it joins: an older one may speak of another.
            and self._records[member.hotkey].roster == self._previous.digest
        )
        anchor = max(found, key=lambda claim: (claim.held, found[claim], claim.weights), default=FROM_SEED)
        self._anchors[stage] = anchor
        for member in joiners:
            if anchor in (FROM_SEED, self._claim(member.hotkey)):
                self._put(member, Standing.ACTIVE, f"restarts stage {stage} from {_name(anchor)}", stage=stage)
        self._dark[stage] = 0

    # -- stages for those who have none ---------------------------------------------------------------------------

    def _take_in(self) -> None:
        """Newcomers wait; who holds the state of a dark stage counts there at once."""
        for hotkey in self._records:
            if hotkey not in self._rows:
                self._put(Member(hotkey=hotkey, standing=Standing.WAIT), Standing.WAIT, "new: waits for a stage")
        for stage, anchor in enumerate(self._anchors):
            if anchor.weights == NO_WEIGHTS or self._active(stage):
                continue
            for hotkey in self._waiting():
                if self._claim(hotkey) == anchor and self._holders(stage) < self._most:
                    why = f"came back with {_name(anchor)} of stage {stage}, which had no replica"
                    self._put(self._rows[hotkey], Standing.ACTIVE, why, stage=stage)
                    self._dark[stage] = 0

    def _waiting(self) -> list[str]:
        return in_order((key for key, row in self._rows.items() if row.standing is Standing.WAIT), self._state)

    def _fill(self) -> None:
        holders = [self._holders(stage) for stage in range(len(self._anchors))]
        rooms = [
            min(max(1, len(self._active(stage))) - len(self._joining(stage)), self._most - holders[stage])
            for stage in range(len(self._anchors))
        ]
        for hotkey in self._waiting():
            open_stages = [stage for stage, room in enumerate(rooms) if room > 0]
            if not open_stages:
                return
            stage = min(open_stages, key=lambda stage: (holders[stage], stage))
            self._put(
                self._rows[hotkey],
                Standing.JOIN,
                f"joins stage {stage}, which has the fewest holders, {holders[stage]}",
                stage=stage,
            )
            holders[stage] += 1
            rooms[stage] -= 1

    def _balance(self) -> None:
        """Pull to stages with few holders, one each."""
        holders = [self._holders(stage) for stage in range(len(self._anchors))]
        for target in sorted(range(len(holders)), key=lambda stage: (holders[stage], stage)):
            if holders[target] >= FEW:
                return
            donors = [stage for stage in range(len(holders)) if holders[stage] >= holders[target] + 2]
            mover = self._mover(target, sorted(donors, key=lambda stage: (-holders[stage], stage)))
            if mover is None or mover.stage is None:
                continue
            holders[mover.stage] -= 1
            holders[target] += 1
            announced = self._previous.target_of(mover.hotkey) == target
            if mover.standing is Standing.ACTIVE and self._active(target) and not announced:
                self._rows[mover.hotkey] = replace(mover, moving=target)
                self._reasons[mover.hotkey] = f"moves to stage {target} at the next refresh, if that still needs it"
            else:
                why = f"pulled from stage {mover.stage} to stage {target}, which has {holders[target] - 1} holders"
                self._put(mover, Standing.JOIN, why, stage=target)

    def _mover(self, target: int, donors: Sequence[int]) -> Member | None:
        """Who leaves for `target`: whom the last roster named, else a joiner, else the lowest hash of the fullest.

        The last ACTIVE of a stage stays.
        """
        announced = [
            member
            for stage in donors
            for member in self._active(stage)
            if self._previous.target_of(member.hotkey) == target and self._can_go(member)
        ]
        if announced:
            return announced[0]
        for stage in donors:
            for group in (self._joining(stage), self._active(stage)):
                free = {member.hotkey: member for member in group if self._can_go(member)}
                if free:
                    return free[in_order(free, self._state)[0]]
        return None

    def _can_go(self, member: Member) -> bool:
        if member.moving is not None or member.stage is None:
            return False
        staying = [other for other in self._active(member.stage) if other.moving is None]
        return member.standing is Standing.JOIN or len(staying) > 1


def _holds(claim: Anchor, anchor: Anchor) -> bool:
    """Whether a claim is the anchor. Weights made from the seed need no digest."""
    from_seed = anchor.held == 0 and claim.held == 0 and NO_WEIGHTS in (claim.weights, anchor.weights)
    return claim == anchor or from_seed or (anchor == FROM_SEED and claim.weights == NO_WEIGHTS)


def _elect(voters: Iterable[Member], claims: Mapping[str, Anchor], anchor: Anchor, closed: int) -> Anchor | None:
    """The state that counts after round `closed` has closed; None if nobody says anything."""
    groups: dict[Anchor, list[int]] = {}
    for member in voters:
        claim = claims[member.hotkey]
        if claim.weights != NO_WEIGHTS and claim.held <= closed:
            groups.setdefault(claim, []).append(member.since)
    if not groups:
        return None
    newest = [claim for claim in groups if claim.held == closed]
    if not newest and anchor in groups:
        return anchor
    return min(
        newest or groups, key=lambda claim: (-len(groups[claim]), -claim.held, min(groups[claim]), claim.weights)
    )


def _name(anchor: Anchor) -> str:
    return f"state {anchor.held}/{anchor.weights.hex()[:8]}" if anchor.weights != NO_WEIGHTS else "the seed's state"
