"""Two nodes that saw the same finalized block agree, and nobody chooses its stage."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from subnet.metagraph import Endpoint
from subnet.swarm.record import Flags, Phase, Record
from subnet.swarm.roster import Anchor, Member, Roster, Standing, candidates, defect, gather
from tests.subnet.swarm.histories import RUN, name, neuron, state


def test_who_is_not_valid_is_left_out_and_told_why() -> None:
    leaving = Record(run=RUN, round=0, phase=Phase.READY, flags=Flags.LEAVING)
    wanted = {
        "": neuron(0),
        "its record is of run 72756e2d30303032": neuron(1, run=b"run-0002"),
        "serves no axon": neuron(2, served=False),
        "its record of block 5 is older than its registration at 9": neuron(3, registered_at=9),
        "wants no stage": neuron(4, record=leaving),
        "has no record": dataclasses.replace(neuron(5), record=b"hello"),
        "no record since block 3, last refresh 4": neuron(6, record_block=3),
    }
    assert set(candidates(state(list(wanted.values())), RUN, fresh_from=4)) == {name(0)}
    for why, one in wanted.items():
        assert defect(one, RUN, fresh_from=4) == why
    assert defect(dataclasses.replace(neuron(7), endpoint=Endpoint("0.0.0.0", 80)), RUN)  # noqa: S104


def test_gathering_waits_for_enough() -> None:
    assert gather(state([neuron(uid) for uid in range(7)]), RUN, stages=4, replicas=2) is None
    roster = gather(state([neuron(uid) for uid in range(8)]), RUN, stages=4, replicas=2)
    assert roster is not None
    assert [len(stage) for stage in roster.stages] == [2, 2, 2, 2]
    assert roster.anchors == (Anchor(0, bytes(32)),) * 4


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


def test_a_stage_holds_what_the_bitmap_holds() -> None:
    many = gather(state([neuron(uid) for uid in range(150)]), RUN, stages=2, replicas=1)
    assert many is not None
    assert [len(stage) for stage in many.stages] == [64, 64]
    assert len(many.waiting) == 22


ROSTER = Roster(
    round=7,
    table=(
        Member(hotkey="a", standing=Standing.ACTIVE, stage=0, since=2, missed=1, strikes=1, moving=1),
        Member(hotkey="b", standing=Standing.ACTIVE, stage=1),
        Member(hotkey="c", standing=Standing.BENCH, until=9, strikes=2),
        Member(hotkey="d", standing=Standing.JOIN, stage=1),
        Member(hotkey="e", standing=Standing.WAIT),
    ),
    anchors=(Anchor(6, b"x" * 32), Anchor(6, b"y" * 32)),
    dark=(0, 0),
    block=140,
    parent=b"p" * 15,
)


def test_reading_a_roster() -> None:
    assert ROSTER.stages == (("a",), ("b",))
    assert ROSTER.members == {"a", "b"}
    assert ROSTER.waiting == ("e",)
    assert [ROSTER.joining(stage) for stage in (0, 1)] == [(), ("d",)]
    assert [ROSTER.stage_of(hotkey) for hotkey in "abcdex"] == [0, 1, None, None, None, None]
    assert [ROSTER.target_of(hotkey) for hotkey in "abcdex"] == [1, None, None, 1, None, None]
    standings = [Standing.ACTIVE, Standing.ACTIVE, Standing.BENCH, Standing.JOIN, Standing.WAIT, None]
    assert [ROSTER.state_of(hotkey) for hotkey in "abcdex"] == standings


@pytest.mark.parametrize(
    "change",
    [
        {"round": 8},
        {"block": 141},
        {"parent": b"q" * 15},
        {"dark": (0, 1)},
        {"anchors": (Anchor(6, b"x" * 32), Anchor(6, b"z" * 32))},
        {"anchors": (Anchor(5, b"x" * 32), Anchor(6, b"y" * 32))},
        {"table": ROSTER.table[:-1]},
        *(
            {"table": (dataclasses.replace(ROSTER.table[0], **field), *ROSTER.table[1:])}
            for field in (
                {"hotkey": "aa"},
                {"standing": Standing.JOIN},
                {"stage": 1},
                {"since": 3},
                {"missed": 0},
                {"strikes": 0},
                {"until": 1},
                {"moving": None},
            )
        ),
    ],
)
def test_the_digest_changes_with_anything(change: dict[str, object]) -> None:
    assert len(ROSTER.digest) == 15
    assert dataclasses.replace(ROSTER, **change).digest != ROSTER.digest
