"""The recurrence, rule by rule, and over random histories: agreement, no thrashing, no stage left empty."""

import dataclasses
from collections.abc import Mapping, Sequence
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from subnet.metagraph import ChainState, Neuron
from subnet.swarm.membership import JOIN_ROUNDS, MAX_STRIKES, Closed, advance, refresh
from subnet.swarm.record import MAX_HAVE, Flags, Phase, Record, short_name
from subnet.swarm.roster import FROM_SEED, NO_WEIGHTS, Anchor, Member, Roster, Standing
from subnet.swarm.snapshot import parse
from tests.subnet.swarm.histories import RUN, World, name, neuron, state

ROUND = 5
STATE = Anchor(ROUND, b"w" * 32)
NOW = 100


def holding(anchor: Anchor = STATE, *, flags: int = 0, roster: bytes = bytes(15)) -> Record:
    return Record(run=RUN, round=anchor.held, phase=Phase.READY, weights=anchor.weights, flags=flags, roster=roster)


def roster(*rows: Member, stages: int = 2, anchor: Anchor = STATE, dark: Sequence[int] | None = None) -> Roster:
    table = tuple(sorted(rows, key=lambda member: member.hotkey))
    return Roster(ROUND, table, (anchor,) * stages, tuple(dark or (0,) * stages), NOW - 20)


def active(uid: int, stage: int, **more: int) -> Member:
    return Member(hotkey=name(uid), standing=Standing.ACTIVE, stage=stage, **more)


def joining(uid: int, stage: int, *, since: int = ROUND, strikes: int = 0) -> Member:
    return Member(hotkey=name(uid), standing=Standing.JOIN, stage=stage, since=since, strikes=strikes)


def around(count: int, records: Mapping[int, Record] | None = None, *, gone: Sequence[int] = ()) -> ChainState:
    """`count` neurons with fresh records, those of `gone` without a sign of life."""
    records = records or {}
    return state(
        [
            neuron(uid, record=records.get(uid, holding()), record_block=5 if uid in gone else NOW - 1)
            for uid in range(count)
        ],
        block=NOW,
    )


def outcome(
    previous: Roster,
    *,
    unlisted: Sequence[int] = (),
    silent: Sequence[int] = (),
    void: Sequence[int] = (),
    claims: Mapping[int, Anchor] | None = None,
) -> Closed:
    """A round that went well but for these."""
    said = dict.fromkeys(previous.members, STATE)
    return Closed(
        previous.round,
        len(previous.members),
        tuple(
            None if stage in void else frozenset(replicas) - {name(uid) for uid in (*unlisted, *silent)}
            for stage, replicas in enumerate(previous.stages)
        ),
        previous.members - {name(uid) for uid in silent},
        said | {name(uid): anchor for uid, anchor in (claims or {}).items()},
    )


def step(previous: Roster, now: ChainState, closed: Closed | None = None) -> Roster:
    closed = outcome(previous) if closed is None else closed
    return advance(previous, now, RUN, fresh_from=previous.block, closed=closed)


FOUR = (active(0, 0), active(1, 0), active(2, 1), active(3, 1))


def test_a_quiet_round_changes_nothing() -> None:
    before = roster(*FOUR)
    after = step(before, around(4))
    assert (after.table, after.anchors) == (before.table, before.anchors)
    assert (after.round, after.block, after.parent) == (ROUND + 1, NOW, before.digest)


def test_who_gives_no_sign_of_life_or_leaves_is_out() -> None:
    after = step(roster(*FOUR), around(4, {2: holding(flags=Flags.LEAVING)}, gone=[0]))
    assert after.stages == ((name(1),), (name(3),))
    assert after.state_of(name(0)) is after.state_of(name(2)) is None


def test_twice_in_no_source_list_is_the_bench_and_benches_double() -> None:
    world = roster(*FOUR)
    once = step(world, around(4), outcome(world, unlisted=[0]))
    assert once.member(name(0)) == dataclasses.replace(FOUR[0], missed=1)
    for strikes in (0, 1, 2, MAX_STRIKES):
        bad = roster(active(0, 0, missed=1, strikes=strikes), *FOUR[1:])
        benched = step(bad, around(4), outcome(bad, unlisted=[0])).member(name(0))
        assert benched is not None
        assert benched.standing is Standing.BENCH
        assert benched.until == ROUND + 1 + 2**strikes
        assert benched.strikes == min(strikes + 1, MAX_STRIKES)
    listed = step(roster(active(0, 0, missed=1), *FOUR[1:]), around(4))
    assert listed.member(name(0)) == FOUR[0]


def test_a_void_round_charges_only_who_cast_no_vote_while_others_did() -> None:
    bad = roster(active(0, 0, missed=1), active(1, 0, missed=1), *FOUR[2:])
    both_voted = step(bad, around(4), outcome(bad, void=[0]))
    assert [both_voted.member(name(uid)) for uid in (0, 1)] == list(bad.table[:2])
    withheld = step(bad, around(4), outcome(bad, void=[0], silent=[0]))
    assert withheld.state_of(name(0)) is Standing.BENCH
    assert withheld.state_of(name(1)) is Standing.ACTIVE
    no_chain = step(bad, around(4), outcome(bad, void=[0, 1], silent=[0, 1, 2]))
    assert no_chain.members == bad.members


def test_the_last_of_a_stage_is_benched_only_if_it_is_dead() -> None:
    bad = roster(active(0, 0, missed=1), *FOUR[2:])
    voted = dataclasses.replace(outcome(bad), listed=(frozenset({name(9)}), frozenset({name(2), name(3)})))
    assert step(bad, around(4, gone=[1]), voted).state_of(name(0)) is Standing.ACTIVE
    assert step(bad, around(4, gone=[1]), outcome(bad, void=[0], silent=[0])).state_of(name(0)) is Standing.BENCH


def watched(
    convicts: Sequence[tuple[int, ...]], *, stakes: Sequence[float] = (), late: Sequence[int] = (), permit: bool = True
) -> ChainState:
    """Eight miners' neurons, and a validator for each tuple, which holds those uids convicted."""
    watchers = [
        neuron(
            100 + index,
            record=dataclasses.replace(
                holding(flags=Flags.OBSERVER), shards=b"".join(short_name(name(uid)) for uid in uids)
            ),
            record_block=5 if index in late else NOW - 1,
            stake=stakes[index] if stakes else 0.0,
            permit=permit,
        )
        for index, uids in enumerate(convicts)
    ]
    return dataclasses.replace(around(8), neurons=(*around(8).neurons, *watchers))


def test_whom_most_of_the_stake_holds_convicted_is_benched_and_stays_there_as_long() -> None:
    world = roster(*FOUR)
    after = step(world, watched([(0,), (0, 3), ()]))
    assert [after.state_of(name(uid)) for uid in range(4)] == [Standing.BENCH, *3 * [Standing.ACTIVE]]
    while after.round < ROUND + 6:
        after = advance(after, watched([(0,), (0,), ()]), RUN, fresh_from=NOW - 20, closed=None)
        member = after.member(name(0))
        assert member is not None
        assert (member.standing, member.strikes) == (Standing.BENCH, 1)
    free = advance(after, watched([(), (0,), ()]), RUN, fresh_from=NOW - 20, closed=None)
    assert free.state_of(name(0)) in (Standing.WAIT, Standing.JOIN)


def test_a_conviction_by_half_of_the_stake_or_by_who_has_no_say_moves_nobody() -> None:
    world = roster(*FOUR)
    quiet = {name(uid): Standing.ACTIVE for uid in range(4)}
    for now in (
        watched([(0,), ()]),
        watched([(0,), (0,), ()], stakes=[1.0, 1.0, 2.0]),
        watched([(0,), (0,), ()], late=[0]),
        watched([(0,)], permit=False),
        watched([(0,)], late=[0]),
    ):
        after = step(world, now)
        assert {hotkey: after.state_of(hotkey) for hotkey in quiet} == quiet
    miners = {uid: dataclasses.replace(holding(), shards=short_name(name(0))) for uid in range(1, 4)}
    after = step(world, around(4, miners))
    assert after.state_of(name(0)) is Standing.ACTIVE


def test_a_stage_keeps_its_replicas_if_all_are_convicted() -> None:
    after = step(roster(*FOUR), watched([(0, 1, 2)]))
    assert after.stages == ((name(0), name(1)), (name(3),))


def test_who_waits_or_joins_is_benched_for_a_conviction_too() -> None:
    waiting = Member(hotkey=name(5), standing=Standing.WAIT)
    after = step(roster(*FOUR, waiting, joining(6, 1)), watched([(5, 6)]))
    assert after.state_of(name(5)) is after.state_of(name(6)) is Standing.BENCH


def test_a_bench_ends_and_is_not_dodged_by_going_away() -> None:
    bench = Member(hotkey=name(4), standing=Standing.BENCH, strikes=1, until=ROUND + 2)
    sitting = step(roster(*FOUR, bench), around(5))
    assert sitting.member(name(4)) == bench
    over = step(dataclasses.replace(sitting, block=NOW - 20), around(5))
    assert over.member(name(4)) == joining(4, 0, since=ROUND + 2, strikes=1)
    away = step(roster(active(0, 0, strikes=2), *FOUR[1:]), around(4, gone=[0]))
    assert away.member(name(0)) == Member(
        hotkey=name(0), standing=Standing.BENCH, since=ROUND + 1, strikes=2, until=ROUND + 1 + 4
    )
    ended = step(roster(*FOUR, dataclasses.replace(bench, until=ROUND + 1)), around(5, gone=[4]))
    assert ended.member(name(4)) == dataclasses.replace(bench, since=ROUND + 1, strikes=0, until=ROUND + 1 + 2)
    forgotten = roster(*FOUR, dataclasses.replace(bench, strikes=0, until=ROUND + 1))
    assert step(forgotten, around(5, gone=[4])).member(name(4)) is None
    unregistered = step(roster(*FOUR, bench), around(4))
    assert unregistered.member(name(4)) is None


def test_strikes_are_forgotten_after_good_service() -> None:
    for since, strikes in ((ROUND + 1 - 8, 0), (ROUND + 1 - 7, 1)):
        after = step(roster(active(0, 0, strikes=1, since=since), *FOUR[1:]), around(4)).member(name(0))
        assert after is not None
        assert after.strikes == strikes


def test_the_anchor_is_what_most_replicas_held_and_others_fetch_it() -> None:
    before = roster(*FOUR, active(4, 0), anchor=Anchor(ROUND - 1, b"v" * 32))
    lie = Anchor(ROUND, b"x" * 32)
    after = step(before, around(5), outcome(before, claims={0: lie}))
    assert after.anchors == (STATE, STATE)
    assert after.member(name(0)) == joining(0, 0, since=ROUND + 1)
    assert after.stages[0] == (name(1), name(4))


def test_a_replica_that_is_behind_or_ahead_decides_nothing() -> None:
    old = Anchor(ROUND - 1, b"v" * 32)
    before = roster(*FOUR, anchor=old)
    for odd in (old, Anchor(ROUND + 1, b"x" * 32), FROM_SEED):
        after = step(before, around(4), outcome(before, claims={0: odd}))
        assert after.anchors[0] == STATE
        assert after.stages[0] == (name(1),)
    stuck = step(before, around(4), outcome(before, claims={0: old, 1: old}))
    assert stuck.anchors[0] == old
    assert stuck.members == before.members


def test_a_tie_goes_to_who_has_counted_longest() -> None:
    for low, high in ((b"a", b"b"), (b"b", b"a")):
        before = roster(active(0, 0, since=4), active(1, 0, since=2), *FOUR[2:])
        claims = {0: Anchor(ROUND, low * 32), 1: Anchor(ROUND, high * 32)}
        after = step(before, around(4), outcome(before, claims=claims))
        assert after.stages[0] == (name(1),)
        assert after.anchors[0] == claims[1]


def test_at_round_0_weights_from_the_seed_need_no_digest() -> None:
    before = Roster.of([[name(0), name(1)], [name(2), name(3)]])
    said = {name(0): Anchor(0, b"w" * 32), name(1): FROM_SEED}
    closed = Closed(0, 4, (None, None), frozenset(), said)
    after = advance(before, around(4), RUN, fresh_from=0, closed=closed)
    assert after.anchors == (Anchor(0, b"w" * 32), FROM_SEED)
    assert after.members == before.members


def test_a_joiner_counts_once_it_holds_the_state() -> None:
    before = roster(*FOUR, joining(4, 0))
    after = step(before, around(5))
    assert after.member(name(4)) == active(4, 0, since=ROUND + 1)
    newer = Anchor(ROUND + 1, b"n" * 32)
    ahead = step(before, around(5, {0: holding(newer), 1: holding(newer), 4: holding(newer)}))
    assert ahead.state_of(name(4)) is Standing.ACTIVE
    half = step(before, around(5, {0: holding(newer), 4: holding(newer)}))
    assert half.state_of(name(4)) is Standing.ACTIVE
    other = Anchor(ROUND + 1, b"m" * 32)
    split = step(before, around(5, {0: holding(newer), 1: holding(other), 4: holding(newer)}))
    assert split.state_of(name(4)) is Standing.JOIN
    for wrong in (Anchor(ROUND, b"x" * 32), Anchor(0, NO_WEIGHTS), newer):
        assert step(before, around(5, {4: holding(wrong)})).state_of(name(4)) is Standing.JOIN


def test_a_joiner_that_takes_too_long_makes_room_unless_nobody_was_there_to_serve() -> None:
    before = roster(*FOUR, joining(4, 0, since=ROUND + 1 - JOIN_ROUNDS))
    blank = {4: holding(FROM_SEED)}
    assert step(before, around(5, blank)).state_of(name(4)) is Standing.BENCH
    silent = outcome(before, void=[0], silent=[0, 1])
    assert step(before, around(5, blank), silent).state_of(name(4)) is Standing.JOIN


def test_newcomers_fill_the_stage_with_the_fewest_holders_and_few_at_once() -> None:
    before = roster(active(0, 0), active(1, 0), active(2, 0), active(3, 1))
    after = step(before, around(12))
    assert [len(after.joining(stage)) for stage in (0, 1)] == [3, 1]
    assert len(after.waiting) == 4
    first = step(before, around(5))
    assert first.member(name(4)) == joining(4, 1, since=ROUND + 1)


def test_a_stage_is_never_larger_than_the_bitmap() -> None:
    before = roster(*(active(uid, 0) for uid in range(MAX_HAVE)), stages=1)
    after = step(before, around(MAX_HAVE + 3))
    assert len(after.stages[0]) == MAX_HAVE
    assert len(after.waiting) == 3


def test_a_poor_stage_pulls_from_the_fullest_after_one_round_of_notice() -> None:
    before = roster(active(0, 0), active(1, 0), active(2, 0), active(3, 1))
    told = step(before, around(4))
    assert [len(stage) for stage in told.stages] == [3, 1]
    (mover,) = (member for member in told.table if member.moving is not None)
    assert (mover.standing, mover.stage, told.target_of(mover.hotkey)) == (Standing.ACTIVE, 0, 1)
    again = dataclasses.replace(told, block=NOW - 20)
    gone = step(again, around(4), outcome(before))
    assert gone.member(mover.hotkey) == joining(int(mover.hotkey[-3:]), 1, since=ROUND + 2)
    # A newcomer in between takes the place, and nobody moves.
    stays = step(again, around(5), outcome(before))
    assert stays.joining(1) == (name(4),)
    assert stays.member(mover.hotkey) == dataclasses.replace(mover, moving=None)


def test_an_empty_stage_pulls_at_once_and_joiners_go_first() -> None:
    after = step(roster(active(0, 0), active(1, 0)), around(2))
    assert [len(stage) for stage in after.stages] == [1, 0]
    assert len(after.joining(1)) == 1
    with_joiner = step(roster(active(0, 0), joining(1, 0)), around(2, {1: holding(FROM_SEED)}))
    assert with_joiner.stages == ((name(0),), ())
    assert with_joiner.joining(1) == (name(1),)


def test_two_against_one_stay_as_they_are() -> None:
    before = roster(active(0, 0), active(1, 0), active(2, 1))
    assert step(before, around(3)).table == before.table


def test_who_returns_with_the_state_of_a_dark_stage_counts_at_once() -> None:
    lost = Anchor(ROUND, b"l" * 32)
    before = dataclasses.replace(roster(*FOUR[:2]), anchors=(STATE, lost))
    after = step(before, around(4, {2: holding(lost), 3: holding(FROM_SEED)}))
    assert after.stages == ((name(0), name(1)), (name(2),))
    assert after.anchors[1] == lost
    # The digest of a stage that lives opens nothing: nobody chooses its stage.
    assert step(before, around(4, {2: holding(STATE), 3: holding(STATE)})).members == before.members


def test_the_last_word_of_a_stage_that_died_is_its_anchor() -> None:
    before = roster(*FOUR, anchor=Anchor(ROUND - 1, b"v" * 32))
    died = step(before, around(4, gone=[2, 3]), outcome(before, void=[1], silent=[2, 3]))
    assert died.stages[1] == ()
    assert died.anchors == (STATE, STATE)
    nothing = dataclasses.replace(outcome(before), claims=dict.fromkeys((name(0), name(1)), STATE))
    assert step(before, around(4, gone=[2, 3]), nothing).anchors == (STATE, before.anchors[1])


def test_a_dark_stage_restarts_from_the_newest_state_its_joiners_have() -> None:
    before = roster(*FOUR[:2], joining(2, 1), joining(3, 1))
    older, oldest = Anchor(ROUND - 1, b"o" * 32), Anchor(ROUND - 2, b"p" * 32)
    claims = {2: holding(older, roster=before.digest), 3: holding(oldest, roster=before.digest)}
    first = step(before, around(4, claims))
    assert (first.members, first.dark) == (before.members, (0, 1))
    last = dataclasses.replace(first, block=NOW - 20)
    claims = {2: holding(older, roster=last.digest), 3: holding(oldest, roster=last.digest)}
    second = step(last, around(4, claims), outcome(before))
    assert second.anchors[1] == older
    assert second.stages[1] == (name(2),)
    assert second.joining(1) == (name(3),)
    assert second.dark == (0, 0)
    # Claims made before it was known who joins what speak of other stages: then the seed it is.
    stale = {2: holding(older, roster=before.digest), 3: holding(FROM_SEED)}
    from_seed = step(last, around(4, stale), outcome(before))
    assert from_seed.anchors[1] == FROM_SEED
    assert from_seed.stages[1] == (name(2), name(3))


def test_every_change_and_everybody_outside_has_a_reason() -> None:
    before = roster(active(0, 0, missed=1), *FOUR[1:], active(4, 0))
    found = refresh(before, around(7, gone=[1, 6]), RUN, fresh_from=before.block, closed=outcome(before, unlisted=[0]))
    assert set(found.reasons) == {name(uid) for uid in (0, 1, 5, 6)}
    assert "no source list" in found.reasons[name(0)]
    assert found.reasons[name(1)] == "out: no record since block 5, last refresh 80"
    assert "fewest holders" in found.reasons[name(5)]


# -- random histories ---------------------------------------------------------------------------------------------

KINDS = ("die", "return", "arrive", "freeze", "thaw", "leave", "lie", "deregister")
Event = tuple[str, int]
EVENTS = st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 30)), max_size=4)
PEACEFUL = st.lists(
    st.tuples(st.sampled_from(("die", "return", "arrive", "freeze", "leave")), st.integers(0, 30)), max_size=3
)


def happen(world: World, events: Sequence[Event]) -> None:
    for kind, index in events:
        if kind == "arrive":
            if len(world.nodes) < 30:
                world.arrive()
            continue
        node = world.nodes[index % len(world.nodes)]
        node.always_well = False
        if kind in ("die", "return"):
            node.alive = kind == "return"
        elif kind in ("freeze", "thaw"):
            node.frozen = kind == "freeze"
        elif kind == "leave":
            node.leaving = True
        elif kind == "lie":
            node.lying = True
        else:
            node.registered = False


def placed(roster: Roster) -> dict[str, int]:
    """Stage by holder."""
    return {member.hotkey: member.stage for member in roster.table if member.stage is not None}


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 4), st.integers(4, 10), st.lists(EVENTS, min_size=3, max_size=14), st.randoms())
def test_whatever_happens_nodes_agree_and_the_table_is_sound(
    stages: int, nodes: int, history: list[list[Event]], random: Random
) -> None:
    world = World.start(stages=stages, nodes=nodes)
    for events in history:
        happen(world, events)
        before = world.roster
        after = world.play().roster
        now = world.state(after.block)
        shuffled: list[Neuron] = list(now.neurons)
        random.shuffle(shuffled)
        other = dataclasses.replace(now, neurons=tuple(shuffled))
        # Another node starts from a snapshot and reads the same state in another order.
        assert advance(parse(before.encoded), other, RUN, fresh_from=before.block, closed=world.closed) == after
        assert parse(after.encoded) == after

        hotkeys = [member.hotkey for member in after.table]
        assert hotkeys == sorted(set(hotkeys))
        assert set(hotkeys) <= {node.hotkey for node in world.nodes if node.registered}
        for node in world.nodes:
            row = after.member(node.hotkey)
            if node.leaving and node.alive:
                assert row is None or row.standing is Standing.BENCH
            if row is not None:
                assert row.strikes <= MAX_STRIKES
                assert row.until <= after.round + 2**MAX_STRIKES
        for stage in range(stages):
            fresh = [key for key in after.joining(stage) if placed(before).get(key) != stage]
            assert len(fresh) <= max(1, len(after.stages[stage])) + 1  # one more may be pulled


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 4), st.integers(4, 10), st.lists(EVENTS, max_size=12))
def test_no_stage_stays_empty_while_a_spare_exists(stages: int, nodes: int, history: list[list[Event]]) -> None:
    world = World.start(stages=stages, nodes=nodes)
    for events in history:
        happen(world, events)
        world.play()
    for _ in range(6):
        world.play()
    sizes = [len(stage) for stage in world.roster.stages]
    holders = [size + len(world.roster.joining(stage)) for stage, size in enumerate(sizes)]
    if 0 in sizes:
        assert not world.roster.waiting
        assert max(holders) < 2 or holders[sizes.index(0)] > 0, (sizes, holders)


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 4), st.integers(4, 10), st.lists(PEACEFUL, min_size=3, max_size=14))
def test_nobody_thrashes(stages: int, nodes: int, history: list[list[Event]]) -> None:
    world = World.start(stages=stages, nodes=nodes)
    moves = departures = 0
    short = sum(max(0, 2 - len(replicas)) ** 2 for replicas in world.roster.stages)
    for events in history:
        happen(world, events)
        before = world.roster
        after = world.play().roster
        was, now = placed(before), placed(after)
        departures += len(was.keys() - now.keys())
        moves += sum(was[hotkey] != now[hotkey] for hotkey in was.keys() & now.keys())
        for node in world.nodes:
            if node.always_well and node.hotkey in was:
                assert node.hotkey in now, (node.hotkey, world.last and world.last.reasons.get(node.hotkey))
                if was[node.hotkey] == now[node.hotkey] and before.stage_of(node.hotkey) is not None:
                    assert after.stage_of(node.hotkey) == was[node.hotkey]
    assert moves <= short + 3 * departures


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 6), st.lists(PEACEFUL, max_size=6))
def test_a_well_joiner_counts_within_two_refreshes(stages: int, extra: int, history: list[list[Event]]) -> None:
    world = World.start(stages=stages, nodes=2 * stages)
    for events in history:
        happen(world, events)
        world.play()
    for _ in range(extra):
        world.arrive()
    for _ in range(3):
        before = world.roster
        world.play()
        world.play()
        for member in before.table:
            replicas = before.stages[member.stage] if member.stage is not None else ()
            served = not replicas or any(world.node(hotkey).works for hotkey in replicas)
            if member.standing is Standing.JOIN and world.node(member.hotkey).works and served:
                row = world.roster.member(member.hotkey)
                moved = row is not None and (row.stage != member.stage or row.since > before.round + 2)
                assert world.roster.stage_of(member.hotkey) is not None or moved, member


def test_a_whole_swarm_that_died_comes_back_where_it_was() -> None:
    world = World.start(stages=3, nodes=6)
    for _ in range(3):
        world.play()
    held = world.roster.stages
    for node in world.nodes:
        node.alive = False
    for _ in range(2):
        world.play()
    assert world.roster.table == ()
    for node in world.nodes:
        node.alive = True
    world.play()
    assert world.roster.stages == held
    anchors = world.roster.anchors
    assert all(anchor.held >= 2 for anchor in anchors)
    world.play()
    assert world.roster.stages == held
