"""Two nodes that saw the same finalized block agree, no stage stays empty, and nobody chooses its stage."""

import dataclasses

from hypothesis import given, settings
from hypothesis import strategies as st

from subnet.metagraph import ChainState, Endpoint, Head, Neuron
from subnet.swarm.record import Phase, Record
from subnet.swarm.roster import advance, candidates, gather

RUN = b"run-0001"


def neuron(uid: int, *, run: bytes = RUN, served: bool = True, registered_at: int = 1, record_block: int = 5) -> Neuron:
    return Neuron(
        uid=uid,
        hotkey=f"hotkey-{uid:03d}",
        coldkey="cold",
        stake=0.0,
        validator_permit=False,
        endpoint=Endpoint("127.0.0.1", 8000 + uid) if served else None,
        registered_at=registered_at,
        last_update=0,
        incentive=0.0,
        dividends=0.0,
        record=Record(run=run, round=0, phase=Phase.READY).encode(),
        record_block=record_block,
    )


def state(neurons: list[Neuron], *, block: int = 10) -> ChainState:
    return ChainState(Head(block, f"0x{block:064x}", 0), 9, "owner", 20, tuple(neurons))


def test_who_is_not_valid_is_left_out() -> None:
    neurons = [
        neuron(0),
        neuron(1, run=b"run-0002"),
        neuron(2, served=False),
        neuron(3, registered_at=9, record_block=5),
    ]
    assert set(candidates(state(neurons), RUN)) == {"hotkey-000"}


def test_gathering_waits_for_enough() -> None:
    assert gather(state([neuron(uid) for uid in range(7)]), RUN, stages=4, replicas=2) is None
    roster = gather(state([neuron(uid) for uid in range(8)]), RUN, stages=4, replicas=2)
    assert roster is not None
    assert [len(stage) for stage in roster.stages] == [2, 2, 2, 2]


@settings(max_examples=60, deadline=None)
@given(st.permutations(list(range(12))), st.integers(1, 4), st.integers(1, 1000))
def test_roster_is_a_function_of_the_block_alone(order: list[int], stages: int, block: int) -> None:
    one = gather(state([neuron(uid) for uid in range(12)], block=block), RUN, stages=stages, replicas=1)
    two = gather(state([neuron(uid) for uid in order], block=block), RUN, stages=stages, replicas=1)
    assert one is not None
    assert two is not None
    assert one == two
    assert one.digest == two.digest
    sizes = [len(stage) for stage in one.stages]
    assert max(sizes) - min(sizes) <= 1
    assert len(one.members) == 12


def test_the_block_hash_decides_who_holds_what() -> None:
    rosters = {
        gather(state([neuron(uid) for uid in range(8)], block=block), RUN, stages=4, replicas=2) for block in range(8)
    }
    assert len({roster.stages for roster in rosters if roster is not None}) > 1


def test_members_stay_while_valid_and_newcomers_wait() -> None:
    first = gather(state([neuron(uid) for uid in range(8)]), RUN, stages=4, replicas=2)
    assert first is not None
    gone = first.stages[1][0]
    neurons = [n for n in (neuron(uid) for uid in range(9)) if n.hotkey != gone]
    second = advance(first, state(neurons, block=20), RUN, fresh_from=5)
    assert second.round == 1
    assert gone not in second.members
    assert second.waiting == ("hotkey-008",)
    for stage, replicas in enumerate(second.stages):
        assert set(replicas) <= set(first.stages[stage])
    assert second.digest != first.digest


def test_who_shows_no_sign_of_life_is_out() -> None:
    first = gather(state([neuron(uid) for uid in range(4)]), RUN, stages=2, replicas=2)
    assert first is not None
    alive = [neuron(uid, record_block=5 if uid == 3 else 15) for uid in range(4)]
    second = advance(first, state(alive, block=20), RUN, fresh_from=10)
    assert second.members == first.members - {"hotkey-003"}


def test_an_unspecified_address_is_no_axon_and_a_stage_holds_what_the_bitmap_holds() -> None:
    assert not candidates(state([dataclasses.replace(neuron(0), endpoint=Endpoint("0.0.0.0", 80))]), RUN)  # noqa: S104
    many = gather(state([neuron(uid) for uid in range(150)]), RUN, stages=2, replicas=1)
    assert many is not None
    assert [len(stage) for stage in many.stages] == [64, 64]
    assert len(many.waiting) == 22
