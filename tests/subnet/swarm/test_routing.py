"""Routing is a function everyone repeats: balanced, mixing, and deep enough to hide the network."""

from collections import Counter
from math import ceil

from hypothesis import given
from hypothesis import strategies as st

from subnet.swarm.routing import depth, head_of, hops, room, sample_id

REPLICAS = ("a", "b", "c")


@given(st.integers(1, 8), st.integers(0, 500), st.data())
def test_every_sample_belongs_to_one_head(heads: int, index: int, data: st.DataObject) -> None:
    head = data.draw(st.integers(0, heads - 1))
    sample = sample_id(base=4096, heads=heads, head=head, index=index)
    assert head_of(sample, base=4096, heads=heads) == head


def test_samples_of_a_round_are_disjoint() -> None:
    samples = [sample_id(base=0, heads=3, head=head, index=index) for head in range(3) for index in range(50)]
    assert sorted(samples) == list(range(150))


def planned(heads: int, head: int, index: int, *, stage: int = 2, lane: int = 4) -> str:
    return hops(REPLICAS, seed=b"s", stage=stage, head=head, heads=heads, index=index, lane=lane)[0]


@given(st.integers(1, 7), st.integers(1, 40), st.integers(1, 40))
def test_samples_in_a_row_are_on_as_many_replicas(heads: int, lane: int, rows: int) -> None:
    """Within one draw; so the load of replicas is equal to within one microbatch a draw."""
    row = [planned(heads, head, index, lane=rows) for index in range(rows) for head in range(heads)]
    for start in range(0, len(row) - len(REPLICAS) + 1, len(REPLICAS)):
        assert sorted(row[start : start + len(REPLICAS)]) == sorted(REPLICAS)
    whole = Counter(planned(heads, head, index, lane=lane) for index in range(rows) for head in range(heads))
    assert max(whole.values()) - min(whole[replica] for replica in REPLICAS) <= 1 + rows // lane


def test_as_many_heads_as_replicas_have_lanes_of_their_own() -> None:
    for era in range(20):
        lanes = {head: {planned(3, head, 4 * era + place) for place in range(4)} for head in range(3)}
        assert all(len(lane) == 1 for lane in lanes.values())
        assert set().union(*lanes.values()) == set(REPLICAS)


def test_pathways_mix() -> None:
    pairs = Counter((planned(3, 1, index, stage=1), planned(3, 1, index, stage=2)) for index in range(3600))
    assert len(pairs) == 9
    assert min(pairs.values()) > 300


def test_every_replica_is_somewhere_to_go() -> None:
    assert sorted(hops(REPLICAS, seed=b"s", stage=1, head=0, heads=3, index=5, lane=4)) == sorted(REPLICAS)
    assert hops((), seed=b"s", stage=1, head=0, heads=3, index=5, lane=4) == ()


def test_depth_is_the_closed_form() -> None:
    # sota §2.2, Orion-like: P = 16, F + B = 2.63 s, L = 30 ms, x = 22 ms each way.
    wanted = ceil(1.2 * (16 + 4 + 15 * (0.06 + 0.044) / 2.63))
    assert depth(stages=16, compute=2.63, latency=0.03, transfer=0.044, limit=64) == wanted == 25
    assert depth(stages=8, compute=0.1, latency=0.05, transfer=0.844, limit=1000) == ceil(1.2 * (10 + 7 * 0.944 / 0.1))
    assert depth(stages=4, compute=0.01, latency=1.0, transfer=0.0, limit=16) == 16
    assert depth(stages=4, compute=0.0, latency=1.0, transfer=0.0, limit=16) == 4


@given(st.integers(1, 64), st.floats(0.01, 10))
def test_what_is_in_flight_beyond_need_has_room_at_one_stage(stages: int, unit: float) -> None:
    kept = depth(stages=stages, compute=unit, latency=0.0, transfer=0.0, limit=1000)
    assert room(stages=stages, unit_seconds=unit / 2, push_seconds=0.0, limit=1000) > kept - stages
    assert room(stages=stages, unit_seconds=0.0, push_seconds=0.0, limit=7) == 7
