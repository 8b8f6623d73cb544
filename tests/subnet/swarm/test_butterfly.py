"""Pairs hold shards, the chain accepts them, whoever recomputes names who lied."""

import hashlib
import math

import pytest
import torch

from model.optimizer import OuterConfig
from subnet.swarm import butterfly
from subnet.swarm.butterfly import NO_DIGEST, Butterfly, ButterflyError, Verdict, caught, opened, part_of, ranges
from subnet.swarm.codec import Codec, codec_of
from subnet.swarm.merge import Merged, Source, mean, step
from subnet.swarm.record import SHARDS_LIMIT, Phase, Record

SIZES = (1, 2, 3, 5, 8, 12, 17)
OUTER = OuterConfig(lr=0.7, momentum=0.9)


def names(replicas: int) -> tuple[str, ...]:
    return tuple(f"hotkey-{index:02d}" for index in range(replicas))


def seed(number: int) -> bytes:
    return hashlib.sha256(number.to_bytes(4, "little")).digest()


def published(plan: Butterfly, holder: str, digests: dict[int, bytes], *, number: int = 3) -> Record:
    shards = b"".join(digests.get(shard, NO_DIGEST) for shard in plan.shards_of(holder))
    return Record(run=b"run-0001", round=number, phase=Phase.HAVE, shards=shards)


def truths(plan: Butterfly) -> dict[int, bytes]:
    return {shard: seed(shard)[:8] for shard in range(len(plan.pairs))}


@pytest.mark.parametrize("replicas", SIZES)
@pytest.mark.parametrize("count", [136, 1000, 4097])
def test_every_pair_holds_one_of_nearly_equal_shards(replicas: int, count: int) -> None:
    plan = Butterfly.draw(names(replicas), count, seed(0))
    shards = max(1, replicas * (replicas - 1) // 2)
    assert len(set(plan.pairs)) == len(plan.parts) == shards
    assert [index for part in plan.parts for index in part] == list(range(count))
    assert max(map(len, plan.parts)) - min(map(len, plan.parts)) <= 1
    for hotkey in plan.replicas:
        assert len(plan.shards_of(hotkey)) == max(1, replicas - 1)
        assert all(hotkey in plan.holders(shard) for shard in plan.shards_of(hotkey))
        assert 8 * len(plan.shards_of(hotkey)) <= SHARDS_LIMIT


def test_holders_follow_the_seed_alone() -> None:
    plans = [Butterfly.draw(names(8), 1000, seed(number)) for number in (1, 1, 2)]
    assert plans[0] == plans[1]
    assert plans[0].pairs != plans[2].pairs
    assert plans[0].parts == plans[2].parts
    first = [Butterfly.draw(names(5), 1000, seed(number)).pairs[0] for number in range(400)]
    counts = [first.count(pair) for pair in set(first)]
    assert len(counts) == 10
    assert 15 < min(counts) <= max(counts) < 70  # 40 expected, six standard deviations are 36


def test_too_many_replicas_or_too_few_values_name_the_remedy() -> None:
    with pytest.raises(ButterflyError, match=r"18 replicas.* 17: use codec topk2bit"):
        ranges(18, 10_000)
    with pytest.raises(ButterflyError, match="5 parameters for 10 shards"):
        ranges(5, 5)


@pytest.mark.parametrize("replicas", [3, 5, 8, 12])
def test_everybody_is_asked_for_as_many_merged_shards(replicas: int) -> None:
    plan = Butterfly.draw(names(replicas), 1000, seed(4))
    asked = [
        plan.provider(shard, hotkey)
        for hotkey in plan.replicas
        for shard in range(len(plan.pairs))
        if hotkey not in plan.holders(shard)
    ]
    assert {asked.count(hotkey) for hotkey in plan.replicas} == {(replicas - 1) * (replicas - 2) // 2}


def test_four_dead_of_twelve_leave_sixty_of_sixty_six_shards() -> None:
    for number in range(20):
        plan = Butterfly.draw(names(12), 1000, seed(number))
        alive = plan.replicas[:3] + plan.replicas[7:]
        records = {hotkey: published(plan, hotkey, truths(plan)) for hotkey in alive}
        judged = butterfly.verdicts(plan, records, 3)
        assert sum(verdict.accepted is not None for verdict in judged) == 60
        assert sum(verdict.confirmed for verdict in judged) == 28
        assert not any(verdict.contested for verdict in judged)


def test_only_whole_and_timely_digests_count() -> None:
    plan = Butterfly.draw(names(3), 1000, seed(0))
    good = published(plan, plan.replicas[0], truths(plan))
    late = published(plan, plan.replicas[1], truths(plan), number=2)
    odd = Record(run=b"run-0001", round=3, phase=Phase.HAVE, shards=good.shards[:8])
    records = dict(zip(plan.replicas, (good, late, odd), strict=True))
    judged = butterfly.verdicts(plan, records, 3)
    for shard, verdict in enumerate(judged):
        mine = plan.replicas[0] in plan.holders(shard)
        assert (verdict.accepted is not None) == mine
        assert not verdict.confirmed


def test_a_lying_holder_contests_each_of_its_shards_and_is_named() -> None:
    plan = Butterfly.draw(names(5), 1000, seed(0))
    truth = truths(plan)
    liar = plan.replicas[2]
    records: dict[str, Record | None] = {hotkey: published(plan, hotkey, truth) for hotkey in plan.replicas}
    records[liar] = published(plan, liar, dict.fromkeys(truth, b"\x01" * 8))
    for shard, verdict in enumerate(butterfly.verdicts(plan, records, 3)):
        assert verdict.contested == (liar in plan.holders(shard))
        assert verdict.liars(truth[shard]) == ((liar,) if liar in plan.holders(shard) else ())
        assert verdict.accepted == (None if verdict.contested else truth[shard])


def test_a_source_counts_in_a_shard_if_one_of_its_holders_has_it() -> None:
    plan = Butterfly.draw(names(5), 1000, seed(0))
    listed = [Source(index, hotkey, bytes(32), 1) for index, hotkey in enumerate(plan.replicas)]
    unlucky = plan.holders(0)
    records: dict[str, Record | None] = {
        hotkey: Record(run=b"run-0001", round=3, phase=Phase.HAVE, have=0b01111 if hotkey in unlucky else 0b11111)
        for hotkey in plan.replicas
    }
    for shard, pair in enumerate(plan.pairs):
        counted = butterfly.shard_sources(plan, shard, listed, records, 3)
        assert len(counted) == (4 if pair == unlucky else 5)
    records[unlucky[0]] = None
    assert len(butterfly.shard_sources(plan, 0, listed, records, 3)) == 4


def test_unconfirmed_shards_are_rechecked_first() -> None:
    plan = Butterfly.draw(names(5), 1000, seed(0))
    me = plan.replicas[0]
    truth = truths(plan)
    judged = [Verdict(dict.fromkeys(pair, truth[shard]), 2) for shard, pair in enumerate(plan.pairs)]
    choices = {butterfly.recheck(plan, judged, me, seed(number)) for number in range(200)}
    assert choices == set(range(10)) - set(plan.shards_of(me))
    lone = next(shard for shard in range(10) if me not in plan.holders(shard))
    judged[lone] = Verdict({plan.holders(lone)[0]: truth[lone]}, 2)
    assert {butterfly.recheck(plan, judged, me, seed(number)) for number in range(50)} == {lone}
    pair = Butterfly.draw(names(2), 1000, seed(0))
    assert butterfly.recheck(pair, [Verdict(dict.fromkeys(pair.replicas, b"x" * 8), 2)], "hotkey-00", b"") is None


@pytest.mark.parametrize("replicas", [3, 5, 8, 12])
def test_a_colluding_pair_is_caught_as_often_as_stated(replicas: int) -> None:
    """200 seeded trials against the binomial law, four standard deviations."""
    trials, hits = 200, 0
    for trial in range(trials):
        plan = Butterfly.draw(names(replicas), 1000, seed(trial))
        target = trial % len(plan.pairs)
        truth = truths(plan)
        said = truth | {target: b"\x01" * 8}
        judged = butterfly.verdicts(plan, {hotkey: published(plan, hotkey, said) for hotkey in plan.replicas}, 3)
        named = set()
        for index, hotkey in enumerate(plan.replicas):
            if hotkey in plan.holders(target):
                continue
            choice = butterfly.recheck(plan, judged, hotkey, seed(trial * 100 + index + 10**6))
            assert choice is not None
            named.update(judged[choice].liars(truth[choice]))
        assert named in (set(), set(plan.holders(target)))
        hits += bool(named)
    expected = caught(replicas)
    bound = 4 * math.sqrt(trials * expected * (1 - expected))
    assert abs(hits - trials * expected) <= bound
    assert [round(caught(n), 2) for n in (1, 2, 3, 5, 8, 12)] == [0, 0, 1, 0.42, 0.25, 0.17]


@pytest.mark.parametrize("name", ["bf16", "int8"])
def test_a_shard_is_the_same_for_holder_and_receiver_and_part_of_the_whole(name: str) -> None:
    codec: Codec = codec_of(name)
    generator = torch.Generator().manual_seed(1)
    state = Merged(torch.randn(1001, generator=generator), torch.randn(1001, generator=generator))
    deltas = [torch.randn(1001, generator=generator) * 1e-3 for _ in range(3)]
    for part in ranges(3, 1001):
        before = part_of(state, part)
        merged = butterfly.reduce(codec, before, [delta[part.start : part.stop] for delta in deltas], OUTER)
        assert len(merged.payload) == codec.payload_bytes(len(part))
        received = opened(codec, before, merged.payload, OUTER)
        assert received.digest == merged.digest
        assert torch.equal(received.state.theta, merged.state.theta)
        exact = step(state, mean(deltas), OUTER)
        assert torch.allclose(merged.state.theta, exact.theta[part.start : part.stop], atol=2e-5)
        other = Merged(merged.state.theta, merged.state.momentum + 1)
        assert opened(codec, other, merged.payload, OUTER).digest != merged.digest


def test_traffic_formulas() -> None:
    assert [butterfly.butterfly_bytes(n, 120) for n in (1, 2, 3, 5, 8)] == [0, 120, 200, 264, 300]
    assert [butterfly.recheck_bytes(n, 120) for n in (1, 2, 3, 5, 8)] == [0, 0, 80, 48, 30]
    assert all(butterfly.butterfly_bytes(n, 1) + butterfly.recheck_bytes(n, 1) < 3 for n in range(1, 18))
    assert [butterfly.gather_bytes(n, 120) for n in (1, 2, 5)] == [0, 120, 480]
