"""What a validator holds replicas to at a round's start, after it has seen the merge before and after it has not."""

from types import SimpleNamespace
from typing import cast

import pytest
import torch

from neurons import follower
from neurons.bench import Bench
from neurons.follower import PublicStates
from neurons.node import Node
from subnet.swarm.merge import Merged
from subnet.swarm.roster import Roster

AFTER = torch.ones(4)


@pytest.mark.parametrize("seen", [True, False])
async def test_who_joined_is_held_to_the_state_before_the_merge_or_to_nothing(
    seen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A newcomer trains from the state before the merge that still went on. Who fetched the state after it, because it
    was not there to follow, does not know that one."""

    async def found(*_arguments: object, **_named: object) -> Merged:
        return Merged(AFTER, torch.empty(0))

    async def at_once(_block: int) -> None:
        return None

    monkeypatch.setattr(follower, "after_merge", found)
    marks = SimpleNamespace(merge=42, length=30, close=28, overlapped=True)
    manifest = SimpleNamespace(merge=SimpleNamespace(codec="topk2bit"), round=marks)
    node = SimpleNamespace(loaded=SimpleNamespace(manifest=manifest), plans=[None], wait=at_once)
    stage = torch.nn.Linear(2, 2, bias=False)
    torch.nn.init.zeros_(stage.weight)
    states = PublicStates(cast("Node", node), cast("Bench", SimpleNamespace(stages=[stage])))
    before, newcomer = Roster.of([["a"]]), Roster.of([["a", "b"]])
    before, newcomer = (
        SimpleNamespace(round=number, block=0, stages=roster.stages, members=roster.members, stage_of=roster.stage_of)
        for number, roster in ((2, before), (3, newcomer))
    )
    if seen:
        states.held = [3]
        states._before, states._public = [Merged(torch.zeros(4), torch.empty(0))], [await found()]
        states._round, states._members, states._payloads = 2, frozenset({"a"}), {}
    else:
        states.held = [0]
        assert await states.follow(cast("Roster", before), b"") == ()
    start = states.round_start(cast("Roster", newcomer))
    assert [theta.tolist() for theta in start.weights("b")] == ([[0.0] * 4, [1.0] * 4] if seen else [])
    assert start.public[0] is AFTER or seen
