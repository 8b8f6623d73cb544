"""Routing is a function everyone repeats: balanced, mixing, and deep enough to hide the network."""

from collections import Counter
from math import ceil

from hypothesis import given
from hypothesis import strategies as st

from subnet.swarm.routing import depth, head_of, hops, sample_id

REPLICAS = ("a", "b", "c")


@given(st.integers(1, 8), st.integers(0, 500), st.data())
def test_every_sample_belongs_to_one_head(heads: int, index: int, data: st.DataObject) -> None:
    head = data.draw(st.integers(0, heads - 1))
    sample = sample_id(base=4096, heads=heads, head=head, index=index)
    assert head_of(sample, base=4096, heads=heads) == head


def test_samples_of_a_round_are_disjoint() -> None:
    samples = [sample_id(base=0, heads=3, head=head, index=index) for head in range(3) for index in range(50)]
    assert sorted(samples) == list(range(150))


def test_load_is_equal_to_within_one_microbatch() -> None:
    for count in (1, 7, 50, 300):
        planned = Counter(hops(REPLICAS, seed=b"s", head="h", stage=2, index=index)[0] for index in range(count))
        assert max(planned.values()) - min(planned[replica] for replica in REPLICAS) <= 1


def test_pathways_mix() -> None:
    pairs = Counter(
        (
            hops(REPLICAS, seed=b"s", head="h", stage=1, index=index)[0],
            hops(REPLICAS, seed=b"s", head="h", stage=2, index=index)[0],
        )
        for index in range(900)
    )
    assert len(pairs) == 9
    assert min(pairs.values()) > 60


def test_every_replica_is_somewhere_to_go() -> None:
    assert sorted(hops(REPLICAS, seed=b"s", head="h", stage=1, index=5)) == sorted(REPLICAS)


def test_depth_is_the_closed_form() -> None:
    # sota §2.2, Orion-like: P = 16, F + B = 2.63 s, L = 30 ms, x = 22 ms each way.
    wanted = ceil(16 + 15 * (0.06 + 0.044) / 2.63)
    assert depth(stages=16, compute=2.63, latency=0.03, transfer=0.044, limit=64) == wanted == 17
    assert depth(stages=8, compute=0.1, latency=0.05, transfer=0.844, limit=1000) == ceil(8 + 7 * 0.944 / 0.1)
    assert depth(stages=4, compute=0.01, latency=1.0, transfer=0.0, limit=16) == 16
    assert depth(stages=4, compute=0.0, latency=1.0, transfer=0.0, limit=16) == 4
