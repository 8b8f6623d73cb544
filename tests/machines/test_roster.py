"""The roster's recurrence over swarms to which things happen, against a ledger of who was where and what it allows."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from subnet.swarm.membership import FORGIVEN_AFTER, JOIN_ROUNDS, MAX_STRIKES, advance
from subnet.swarm.roster import Member, Roster, Standing
from subnet.swarm.snapshot import parse
from tests.subnet.swarm.histories import RUN, World

NODES = 5
STAGES = 2
ALLOWED = {
    None: {None, Standing.WAIT, Standing.JOIN},
    Standing.WAIT: {None, Standing.WAIT, Standing.JOIN, Standing.BENCH},
    Standing.JOIN: {None, Standing.JOIN, Standing.ACTIVE, Standing.BENCH},
    Standing.ACTIVE: {None, Standing.ACTIVE, Standing.JOIN, Standing.BENCH},
    Standing.BENCH: {None, Standing.BENCH, Standing.WAIT, Standing.JOIN},
}
"""Where one may stand a round later. Who waits is taken in within the same refresh."""


class Swarm(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        self.world = World.start(stages=STAGES, nodes=NODES)
        self.digests = {self.world.roster.digest}

    def _node(self, which: int):  # type: ignore[no-untyped-def]  # noqa: ANN202 - of the histories
        return self.world.nodes[which % len(self.world.nodes)]

    @rule(which=st.integers(0, 2 * NODES))
    def die(self, which: int) -> None:
        self._node(which).alive = False

    @rule(which=st.integers(0, 2 * NODES))
    def return_(self, which: int) -> None:
        self._node(which).alive = True

    @rule(which=st.integers(0, 2 * NODES), frozen=st.booleans())
    def freeze(self, which: int, frozen: bool) -> None:
        self._node(which).frozen = frozen

    @rule(which=st.integers(0, 2 * NODES), leaving=st.booleans())
    def leave(self, which: int, leaving: bool) -> None:
        self._node(which).leaving = leaving

    @rule(which=st.integers(0, 2 * NODES), lying=st.booleans())
    def lie(self, which: int, lying: bool) -> None:
        self._node(which).lying = lying

    @rule()
    def arrive(self) -> None:
        if len(self.world.nodes) < 2 * NODES:
            self.world.arrive()

    @rule(which=st.integers(0, 2 * NODES))
    def deregister(self, which: int) -> None:
        if sum(node.registered for node in self.world.nodes) > NODES // 2:
            self._node(which).registered = False

    @rule()
    def play(self) -> None:
        self._play(1)

    @rule()
    def play_two(self) -> None:
        self._play(2)

    @rule(rounds=st.integers(1, 5))
    def play_some(self, rounds: int) -> None:
        self._play(rounds)

    @rule(which=st.integers(0, 2 * NODES))
    def is_away_as_its_bench_ends(self, which: int) -> None:
        """Of all moments one that chance seldom hits."""
        node = self._node(which)
        row = self.world.roster.member(node.hotkey)
        if row is not None and row.standing is Standing.BENCH:
            self._play(max(0, row.until - self.world.roster.round - 1))
            node.alive = False
            self._play(1)

    def _play(self, rounds: int) -> None:
        for _ in range(rounds):
            before = self.world.roster
            after = self.world.play().roster
            self._follows(before, after)
            for member in {*before.table, *after.table}:
                self._may(before.member(member.hotkey), after.member(member.hotkey), after)

    def _follows(self, before: Roster, after: Roster) -> None:
        assert after.parent == before.digest
        assert after.digest not in self.digests
        self.digests.add(after.digest)
        now = self.world.state(after.block)
        again = advance(parse(before.encoded), now, RUN, fresh_from=before.block, closed=self.world.closed)
        assert again.digest == after.digest

    def _may(self, was: Member | None, now: Member | None, after: Roster) -> None:
        """What one round can do to one row."""
        stood, stands = (row.standing if row is not None else None for row in (was, now))
        assert stands in ALLOWED[stood], (was, now)
        if now is None:
            assert was is None or not was.strikes or not self.world.node(was.hotkey).registered, (
                "strikes are waited out"
            )
            return
        assert (now.stage is None) == (stands in {Standing.WAIT, Standing.BENCH})
        if was is None:
            assert now.strikes == 0
            return
        if stands is Standing.ACTIVE:
            assert was.stage == now.stage, "a stage is changed by joining it"
        if stands is Standing.JOIN and stood is Standing.JOIN and was.stage == now.stage:
            voted = self.world.closed.voted if self.world.closed is not None else frozenset()
            served = voted & {*after.stages[now.stage or 0]}
            assert after.round - now.since <= JOIN_ROUNDS or not served, "who takes too long makes room"
        if stood is Standing.BENCH and stands is not Standing.BENCH:
            assert after.round >= was.until, "a bench is sat through"
        self._strikes(was, now, after)

    def _strikes(self, was: Member, now: Member, after: Roster) -> None:
        if now.strikes > was.strikes:
            assert now.standing is Standing.BENCH is not was.standing
            assert now.strikes == was.strikes + 1
            assert now.until == after.round + 2**was.strikes
        elif now.strikes < was.strikes and was.standing is Standing.BENCH:
            assert (now.standing, now.strikes) == (Standing.BENCH, was.strikes - 1), "one after the other"
            assert not self.world.node(now.hotkey).works
            assert now.until == after.round + 2**was.strikes
        elif now.strikes < was.strikes:
            assert now.strikes == 0
            assert after.round - was.since >= FORGIVEN_AFTER * 2**was.strikes, "they are forgotten by serving"
        assert now.strikes <= MAX_STRIKES


TestRoster = Swarm.TestCase
TestRoster.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
