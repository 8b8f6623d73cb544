"""A merge survives its replicas: what the chain lists is merged to the same bits, who cheats is named."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from model.optimizer import OuterConfig
from neurons.exchange import LEAVES, PIECES, RECHECK, SHARDS, Leaves
from neurons.terms import Outcome
from subnet.swarm import content
from subnet.swarm.butterfly import (
    NO_DIGEST,
    Butterfly,
    butterfly_bytes,
    caught,
    gather_bytes,
    opened,
    part_of,
    recheck_bytes,
)
from subnet.swarm.merge import Merged, mean, step
from subnet.swarm.record import Phase, Record
from subnet.transport.errors import Unavailable
from tests.neurons.stage import BLOCK, MARKS, Request, Stage, digests_replaced

CODECS = ("topk2bit", "bf16", "int8")
SIZES = (1, 2, 3, 5, 8, 12)
long = pytest.mark.long


def same_state(outcomes: dict[str, Outcome]) -> Merged:
    """The public state, once it is shown to have the same bits on all."""
    states = [outcome.public for outcome in outcomes.values()]
    for state in states:
        assert torch.equal(state.theta, states[0].theta)
        assert torch.equal(state.momentum, states[0].momentum)
    return states[0]


def ends_in_time(stage: Stage) -> None:
    last = MARKS.merge if stage.codec_used.error_feedback else MARKS.end
    assert max(stage.ended.values()) <= last * BLOCK + 1e-6


def indices(parts: Sequence[range]) -> set[int]:
    return {index for part in parts for index in part}


def plan_of(stage: Stage) -> Butterfly:
    seed = hashlib.sha256(f"{stage.seed} {MARKS.cut + 1}".encode()).digest()
    return Butterfly.draw(stage.names, stage.count, seed)


def expected(stage: Stage, names: Sequence[str]) -> Merged:
    """What the merge of these replicas' contributions must be, computed in one place."""
    codec, assigned = stage.codec_used, stage.public
    assert assigned is not None
    if codec.error_feedback:
        sent = [codec.decode(codec.encode(stage.deltas[name]), stage.count) for name in names]
        return step(assigned, mean(sent), stage.outer)
    parts = []
    for part in plan_of(stage).parts:
        deltas = [stage.deltas[name][part.start : part.stop] for name in names]
        change = codec.encode(mean([codec.decode(codec.encode(delta), len(part)) for delta in deltas]))
        parts.append(step(part_of(assigned, part), codec.decode(change, len(part)), stage.outer))
    return Merged(torch.cat([part.theta for part in parts]), torch.cat([part.momentum for part in parts]))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("replicas", [pytest.param(size, marks=long if size == 12 else ()) for size in SIZES])
def test_an_honest_round_merges_everything_to_the_same_bits(replicas: int, codec: str) -> None:
    stage = Stage(replicas, codec, count=20_000 if codec == "topk2bit" else 2000)
    outcomes = stage.play()
    assert len(outcomes) == replicas
    state, truth = same_state(outcomes), expected(stage, stage.names)
    assert torch.equal(state.theta, truth.theta)
    assert torch.equal(state.momentum, truth.momentum)
    for outcome in outcomes.values():
        assert [source.hotkey for source in outcome.listed] == list(stage.names)
        assert indices(outcome.merged) == indices(outcome.taken) == set(range(stage.count))
        assert outcome.included
        assert not any((outcome.carried, outcome.incomplete, outcome.refused, outcome.forged, outcome.liars))
        assert outcome.record.phase is Phase.HAVE
    ends_in_time(stage)


@pytest.mark.parametrize("codec", ["topk2bit", "bf16"])
@pytest.mark.parametrize("seed", [*range(3), *(pytest.param(seed, marks=long) for seed in range(3, 40))])
def test_four_of_twelve_die_at_random_moments_of_the_merge(seed: int, codec: str) -> None:
    chance = np.random.default_rng(seed)
    slow, count, over = ((2.0, 8.0), 50_000, MARKS.have) if codec == "topk2bit" else ((0.5, 3.0), 2000, MARKS.merge)
    stage = Stage(12, codec, count=count, seed=seed, latency=slow)  # fetching fills the time between the marks
    dying = chance.choice(12, size=4, replace=False)
    stage.deaths = {stage.names[index]: float(chance.uniform(0.5, over * BLOCK)) for index in dying}
    outcomes = stage.play()
    assert len(outcomes) == 8
    ends_in_time(stage)
    state = same_state(outcomes)
    first = next(iter(outcomes.values()))
    assert {outcome.listed for outcome in outcomes.values()} == {first.listed}
    assert len(first.listed) >= 8
    for outcome in outcomes.values():
        assert not any((outcome.incomplete, outcome.forged, outcome.refused, outcome.liars))
        assert outcome.merged == first.merged
    if codec == "topk2bit":
        assert first.merged == (range(stage.count),)
        truth = expected(stage, [source.hotkey for source in first.listed])
        assert torch.equal(state.theta, truth.theta)
        return
    assert len(first.merged) >= math.ceil(0.85 * 66)
    assert stage.public is not None
    for part in first.carried:
        assert torch.equal(state.theta[part.start : part.stop], stage.public.theta[part.start : part.stop])
    for outcome in outcomes.values():
        assert indices(outcome.taken) | indices(outcome.carried) == set(range(stage.count))


def test_four_dead_before_the_digests_leave_sixty_shards() -> None:
    stage = Stage(12)
    stage.deaths = {stage.names[index]: MARKS.have * BLOCK - 0.5 for index in (1, 4, 5, 10)}
    outcomes = stage.play()
    same_state(outcomes)
    assert {len(outcome.merged) for outcome in outcomes.values()} == {60}
    ends_in_time(stage)


def test_what_is_carried_over_is_merged_a_round_later() -> None:
    """lr 1 and no momentum: after both rounds θ has moved by the mean of all contributions, exactly."""
    plain = OuterConfig(lr=1.0, momentum=0.0)
    first = Stage(3, count=300, outer=plain, public=Merged(torch.zeros(300), torch.zeros(300)))
    for hotkey in first.names:
        first.deltas[hotkey] = torch.randint(-9, 9, (300,), generator=first.generator) * (3 / 512)
    lost = 1
    for holder in plan_of(first).holders(lost):
        place = 8 * plan_of(first).shards_of(holder).index(lost)
        first.bends[holder] = (
            lambda record, place=place: digests_replaced(  # type: ignore[misc]
                record, record.shards[:place] + NO_DIGEST + record.shards[place + 8 :]
            )
        )
    outcomes = first.play()
    middle = same_state(outcomes)
    part = plan_of(first).parts[lost]
    second = Stage(3, count=300, seed=1, outer=plain, public=middle)
    for hotkey, outcome in outcomes.items():
        assert indices(outcome.carried) == set(part)
        assert not outcome.liars
        pending = first.deltas[hotkey].clone()
        for taken in outcome.taken:
            pending[taken.start : taken.stop] = 0
        second.deltas[hotkey] = pending
    final = same_state(second.play())
    assert torch.equal(final.theta, -mean([first.deltas[hotkey] for hotkey in first.names]))


@pytest.mark.parametrize("codec", CODECS)
def test_one_that_sends_far_more_than_the_others_is_scaled_down(codec: str) -> None:
    """All agree on the bits, and the state moves as if it had sent twice the median's norm."""
    stage = Stage(3, codec, count=20_000 if codec == "topk2bit" else 2000, limit=100.0)
    loud = stage.names[1]
    stage.deltas[loud] = 50 * stage.deltas[loud]
    outcomes = stage.play()
    state, honest = same_state(outcomes), Stage(3, codec, count=stage.count)
    assert stage.public is not None
    moved = float((state.theta - stage.public.theta).norm())
    usual = float((expected(honest, honest.names).theta - stage.public.theta).norm())
    unclipped = float((expected(stage, stage.names).theta - stage.public.theta).norm())
    assert unclipped > 15 * usual
    assert moved < 2.5 * usual
    for outcome in outcomes.values():
        assert not outcome.refused
        assert outcome.included, "it is scaled, not left out"


@pytest.mark.parametrize("replicas", [3, 5, 8])
@pytest.mark.parametrize("seed", range(2))
def test_a_lying_holder_is_named_every_time(replicas: int, seed: int) -> None:
    stage = Stage(replicas, seed=seed)
    liar = stage.names[seed % replicas]
    stage.bends[liar] = lambda record: digests_replaced(record, b"\x01" * len(record.shards))
    outcomes = stage.play()
    same_state(outcomes)
    mine = plan_of(stage).shards_of(liar)
    for hotkey, outcome in outcomes.items():
        assert not outcome.incomplete
        assert indices(outcome.carried) == indices([plan_of(stage).parts[shard] for shard in mine])
        if hotkey != liar:
            assert set(outcome.liars) == {liar}
            assert set(outcome.liars[liar]) == set(mine)


def colluding(stage: Stage) -> tuple[str, ...]:
    """Let the pair of shard 0 merge it wrong, publish that alike and serve it."""
    plan, codec = plan_of(stage), stage.codec_used
    pair = plan.holders(0)
    assert stage.public is not None
    wrong = codec.encode(torch.full((len(plan.parts[0]),), 0.25))
    digest = opened(codec, part_of(stage.public, plan.parts[0]), wrong, stage.outer).digest
    for holder in pair:  # shard 0 is the first of both
        stage.bends[holder] = lambda record: digests_replaced(record, digest + record.shards[8:])

    def forge(holder: str, asker: str, request: Request, reply: object) -> object:
        if request[0] == "merged 0" and holder in pair:
            return bytes(content.cut(wrong, piece_bytes=stage.piece_bytes)[request[2]])
        return reply

    stage.forge = forge
    return pair


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("replicas", "trials"), [(3, 10), (5, 20), pytest.param(5, 200, marks=long), pytest.param(8, 200, marks=long)]
)
def test_a_colluding_pair_is_caught_as_often_as_stated(replicas: int, trials: int) -> None:
    hits = 0
    for seed in range(trials):
        stage = Stage(replicas, count=60, seed=seed)
        pair = colluding(stage)
        outcomes = stage.play()
        honest = {hotkey: outcome for hotkey, outcome in outcomes.items() if hotkey not in pair}
        same_state(honest)
        named = {liar for outcome in honest.values() for liar in outcome.liars}
        assert named in (set(), set(pair))
        hits += bool(named)
    bound = 4 * math.sqrt(trials * caught(replicas) * (1 - caught(replicas)))
    assert abs(hits - trials * caught(replicas)) <= bound


@pytest.mark.parametrize("codec", ["bf16", "int8"])
def test_who_is_told_of_a_shard_later_finds_the_pair_that_lied_about_it(codec: str) -> None:
    stage = Stage(5, codec=codec, count=60)
    pair = colluding(stage)
    stage.play()
    assert stage.judge(0) == pair
    assert stage.judge(1) == ()
    assert stage.judge(99) == ()
    stage.dead.update(stage.names)
    assert stage.judge(0) == (), "nobody serves the pieces any more"


def test_an_all_gather_has_no_holders_to_lie() -> None:
    stage = Stage(3, codec="topk2bit", count=5000)
    stage.play()
    assert stage.judge(0) == ()


@pytest.mark.parametrize("codec", CODECS)
def test_a_source_that_equivocates_is_named_by_whom_it_tried(codec: str) -> None:
    stage = Stage(5, codec)
    cheat, victims = stage.names[2], stage.names[3:]

    def forge(holder: str, asker: str, request: Request, reply: object) -> object:
        if holder == cheat and asker in victims and request[:2] == ("piece", cheat):
            assert isinstance(reply, bytes)
            return bytes(len(reply))
        return reply

    stage.forge = forge
    outcomes = stage.play()
    state, truth = same_state(outcomes), expected(stage, stage.names)
    for hotkey, outcome in outcomes.items():
        assert set(outcome.forged) == ({cheat} if hotkey in victims else set())
        assert not any((outcome.incomplete, outcome.refused))
    if codec == "topk2bit":  # the others relay the true pieces
        assert torch.equal(state.theta, truth.theta)
        return
    # Where both holders are its victims, its piece is with nobody: the shard is merged without it.
    without = expected(stage, [name for name in stage.names if name != cheat])
    lost = [shard for shard, pair in enumerate(plan_of(stage).pairs) if set(pair) <= set(victims)]
    assert len(lost) == 1
    for shard, part in enumerate(plan_of(stage).parts):
        right = without if shard in lost else truth
        assert torch.equal(state.theta[part.start : part.stop], right.theta[part.start : part.stop])
        assert (set(part) <= indices(outcomes[cheat].taken)) == (shard not in lost)


@pytest.mark.parametrize("codec", CODECS)
def test_leaves_of_another_root_are_named_and_their_source_left_out(codec: str) -> None:
    stage = Stage(5, codec)
    cheat = stage.names[0]

    def forge(holder: str, asker: str, request: Request, reply: object) -> object:
        if holder == cheat and request == ("leaves", cheat, 0):
            assert isinstance(reply, tuple)
            leaves: Leaves = (tuple(bytes(32) for _ in reply[0]), reply[1])
            return leaves
        return reply

    stage.forge = forge
    outcomes = stage.play()
    state, truth = same_state(outcomes), expected(stage, stage.names[1:])
    assert torch.equal(state.theta, truth.theta)
    for hotkey, outcome in outcomes.items():
        assert [source.hotkey for source in outcome.listed] == list(stage.names[1:])
        assert set(outcome.forged) == ({cheat} - {hotkey})
        assert outcome.included == (hotkey != cheat)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(("kind", "reason"), [("nan", "NaN"), ("large", "the limit is 1")])
def test_invalid_content_is_refused_by_all_alike(codec: str, kind: str, reason: str) -> None:
    stage = Stage(5, codec, limit=1.0)
    cheat = stage.names[4]
    if kind == "large":
        stage.deltas[cheat] *= 1e4
    else:
        prepare = stage.prepare

        def poisoned(hotkey: str, pieces: tuple[bytes, ...]) -> None:
            prepare(hotkey, tuple(b"\xff" * len(piece) for piece in pieces) if hotkey == cheat else pieces)

        stage.prepare = poisoned  # type: ignore[method-assign]
    outcomes = stage.play()
    state, truth = same_state(outcomes), expected(stage, stage.names[:4])
    assert torch.equal(state.theta, truth.theta)
    for outcome in outcomes.values():
        assert set(outcome.refused) == {cheat}
        assert reason in outcome.refused[cheat] or codec == "topk2bit"
        assert not any((outcome.forged, outcome.liars, outcome.incomplete))
    assert not outcomes[cheat].included


def test_one_bad_piece_costs_its_source_that_shard_alone() -> None:
    stage = Stage(5)
    cheat, bad = stage.names[4], 3
    prepare = stage.prepare

    def poisoned(hotkey: str, pieces: tuple[bytes, ...]) -> None:
        own = stage.terms(hotkey).layout().shards[bad]
        spoiled = [b"\xff" * len(piece) if index in own else piece for index, piece in enumerate(pieces)]
        prepare(hotkey, tuple(spoiled) if hotkey == cheat else pieces)

    stage.prepare = poisoned  # type: ignore[method-assign]
    outcomes = stage.play()
    state = same_state(outcomes)
    whole, without = expected(stage, stage.names), expected(stage, stage.names[:4])
    for shard, part in enumerate(plan_of(stage).parts):
        truth = without if shard == bad else whole
        assert torch.equal(state.theta[part.start : part.stop], truth.theta[part.start : part.stop])
    assert indices(outcomes[cheat].taken) == set(range(stage.count)) - set(plan_of(stage).parts[bad])


@pytest.mark.parametrize("codec", CODECS)
def test_a_replica_that_withholds_its_bitmap_stops_nobody(codec: str) -> None:
    stage = Stage(5, codec)
    stage.bends[stage.names[1]] = lambda record: None if record.phase >= Phase.HAVE else record
    outcomes = stage.play()
    state = same_state(outcomes)
    assert torch.equal(state.theta, expected(stage, stage.names).theta)
    assert all(outcome.included and not outcome.incomplete for outcome in outcomes.values())
    ends_in_time(stage)


@pytest.mark.parametrize("codec", CODECS)
def test_a_void_round_changes_nothing(codec: str) -> None:
    def silent(record: Record) -> Record | None:
        return None if record.phase >= Phase.HAVE else record

    stage = Stage(3, codec)
    stage.bends = dict.fromkeys(stage.names[:2], silent)
    outcomes = stage.play()
    assert same_state(outcomes).theta is stage.public.theta  # type: ignore[union-attr]
    for outcome in outcomes.values():
        assert not any((outcome.listed, outcome.taken, outcome.included, outcome.merged))
        assert outcome.carried == (range(stage.count),)


def test_who_misses_the_cut_merges_the_others_and_keeps_its_own() -> None:
    for codec in ("topk2bit", "bf16"):
        stage = Stage(5, codec)
        stage.bends[stage.names[2]] = lambda record: None if record.phase is Phase.CUT else record
        outcomes = stage.play()
        state = same_state(outcomes)
        others = [name for name in stage.names if name != stage.names[2]]
        assert torch.equal(state.theta, expected(stage, others).theta)
        assert [outcome.included for outcome in outcomes.values()] == [name in others for name in stage.names]


def test_who_lacks_what_is_listed_is_incomplete() -> None:
    stage = Stage(5, "topk2bit")
    alone = stage.names[0]

    def forge(holder: str, asker: str, request: Request, reply: object) -> object:
        if asker == alone and request[:2] == ("piece", stage.names[3]):
            assert isinstance(reply, bytes)
            return bytes(len(reply))
        return reply

    stage.forge = forge
    outcomes = stage.play()
    assert [outcome.incomplete for outcome in outcomes.values()] == [True, False, False, False, False]
    assert outcomes[alone].included
    del outcomes[alone]
    assert torch.equal(same_state(outcomes).theta, expected(stage, stage.names).theta)
    ends_in_time(stage)


@pytest.mark.parametrize("late_first", [True, False])
def test_a_late_holder_is_not_blamed_for_a_shard_its_partner_lied_about(late_first: bool) -> None:
    """The liar alone published, so its value stands; the late one holds, and first offers, the true shard."""
    stage = Stage(3)
    plan, pair = plan_of(stage), colluding(stage)
    late, liar = pair if late_first else pair[::-1]
    stage.bends[late] = lambda record: None if record.shards else record
    forge = stage.forge
    assert forge is not None

    def by_the_liar(holder: str, asker: str, request: Request, reply: object) -> object:
        return forge(holder, asker, request, reply) if holder == liar else reply

    stage.forge = by_the_liar
    outcomes = stage.play()
    state = same_state(outcomes)
    part = plan.parts[0]
    assert not torch.equal(
        state.theta[part.start : part.stop], expected(stage, stage.names).theta[part.start : part.stop]
    )
    for hotkey, outcome in outcomes.items():
        assert hotkey == liar or outcome.liars == {liar: (0,)}
        assert not any((outcome.forged, outcome.incomplete))
        assert len(outcome.merged) == 3


def test_a_pair_that_keeps_its_shard_to_itself_stops_nobody() -> None:
    stage = Stage(5)
    pair = plan_of(stage).holders(0)

    def forge(holder: str, asker: str, request: Request, reply: object) -> object:
        if holder in pair and asker not in pair and request[0] == "merged 0":
            raise Unavailable("not for you")
        return reply

    stage.forge = forge
    outcomes = stage.play()
    assert torch.equal(same_state(outcomes).theta, expected(stage, stage.names).theta)
    for outcome in outcomes.values():
        assert len(outcome.merged) == 10
        assert not any((outcome.incomplete, outcome.liars, outcome.forged))
    ends_in_time(stage)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("replicas", [1, 2, 5])
def test_who_only_watches_sees_the_same_merge(replicas: int, codec: str) -> None:
    stage = Stage(replicas, codec, watcher="watcher")
    outcomes = stage.play()
    assert torch.equal(same_state(outcomes).theta, expected(stage, stage.names).theta)
    seen = outcomes["watcher"]
    assert seen.record is None
    assert not any((seen.taken, seen.incomplete, seen.liars, seen.forged, sum(seen.sent.values())))


def test_an_accepted_shard_nobody_serves_leaves_its_takers_incomplete() -> None:
    stage = Stage(3)
    pair = plan_of(stage).holders(0)
    stage.bends = dict.fromkeys(pair, lambda record: digests_replaced(record, b"\x01" * 8 + record.shards[8:]))
    outcomes = stage.play()
    third = next(hotkey for hotkey in stage.names if hotkey not in pair)
    assert outcomes[third].incomplete
    assert set(outcomes[third].liars) == set(pair)
    assert set(outcomes[third].forged) == set(pair)
    ends_in_time(stage)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("replicas", [2, 3, 5, 8])
def test_bytes_moved_are_what_the_formula_says(replicas: int, codec: str) -> None:
    stage = Stage(replicas, codec, count=1_000_000 if codec == "topk2bit" else 120_000, piece_bytes=content.PIECE_BYTES)
    outcomes = stage.play()
    payload = sum(stage.terms(stage.names[0]).layout().sizes)
    assert payload == pytest.approx(stage.codec_used.payload_bytes(stage.count), rel=0.01)
    for hotkey, outcome in outcomes.items():
        legs, sent = outcome.received, sum(stage.desks[hotkey].sent.values())
        merge = legs[LEAVES] + legs[PIECES] + legs.get(SHARDS, 0)
        if codec == "topk2bit":
            assert merge == pytest.approx(gather_bytes(replicas, payload), rel=0.05)
            continue
        check = recheck_bytes(replicas, payload)
        assert merge == pytest.approx(butterfly_bytes(replicas, payload), rel=0.05)
        assert legs.get(RECHECK, 0) == pytest.approx(check, rel=0.05)
        assert sent == pytest.approx(butterfly_bytes(replicas, payload) + check, rel=0.05)


def test_a_frozen_source_is_left_out_and_holds_up_nothing() -> None:
    stage = Stage(8)
    stage.deaths = {stage.names[0]: MARKS.cut * BLOCK + 0.01}
    outcomes = stage.play()
    same_state(outcomes)
    for outcome in outcomes.values():
        assert [source.hotkey for source in outcome.listed] == list(stage.names[1:])
        assert len(outcome.merged) == 28
        assert not outcome.incomplete


@dataclass
class Trouble:
    """A stage with deaths at any moment, somebody who publishes wrong digests and somebody who serves wrong bytes."""

    stage: Stage
    liar: str
    forger: str

    @classmethod
    def draw(cls, seed: int) -> Trouble:
        chance = np.random.default_rng(seed)
        codec = CODECS[seed % 3]
        replicas = int(chance.integers(2, 13))
        latency = (0.02, float(chance.uniform(0.1, 9)))
        stage = Stage(replicas, codec, count=20_000 if codec == "topk2bit" else 2000, seed=seed, latency=latency)
        dying = chance.choice(stage.names, size=int(chance.integers(0, replicas // 3 + 1)), replace=False)
        stage.deaths = {str(name): float(chance.uniform(0, MARKS.end * BLOCK)) for name in dying}
        self = cls(stage, str(chance.choice(stage.names)), str(chance.choice(stage.names)))
        stage.bends[self.liar] = lambda record: digests_replaced(record, b"\x01" * len(record.shards))

        def forge(holder: str, asker: str, request: Request, reply: object) -> object:
            if holder != self.forger or chance.uniform() > 0.3 or not isinstance(reply, bytes):
                return reply
            return bytes(len(reply))

        stage.forge = forge
        return self


@pytest.mark.parametrize("seed", [*range(4), *(pytest.param(seed, marks=long) for seed in range(4, 120))])
def test_whatever_happens_replicas_agree_or_know_that_they_lack_something(seed: int) -> None:
    trouble = Trouble.draw(seed)
    stage = trouble.stage
    outcomes = stage.play()
    if not outcomes:
        return
    ends_in_time(stage)
    first = next(iter(outcomes.values()))
    complete = {hotkey: outcome for hotkey, outcome in outcomes.items() if not outcome.incomplete}
    if complete:
        same_state(complete)
    for outcome in outcomes.values():
        assert (outcome.listed, outcome.merged, outcome.carried) == (first.listed, first.merged, first.carried)
        assert indices(outcome.taken) <= indices(outcome.merged)
        assert not outcome.refused
        assert set(outcome.forged) <= {trouble.forger, trouble.liar}  # what a liar gives is not what it published
        assert set(outcome.liars) <= {trouble.liar}
