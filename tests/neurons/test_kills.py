"""What a killed replica costs a swarm: its own share while it is away, and next to nothing before and after."""

from collections.abc import Mapping

import pytest

from scripts.bench.scale import LINK
from tests.neurons.virtual_swarm import VirtualCompute, World, play

FORWARD, BACKWARD = 0.03, 0.06
REPLICAS = 3
CAPACITY = REPLICAS / (FORWARD + BACKWARD)
"""Microbatches per second that a stage can do."""


@pytest.fixture(autouse=True)
def virtual(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neurons.pipeline.ComputeThread", VirtualCompute)


def swarm(kills: Mapping[int, tuple[float, float]], *, seconds: float) -> World:
    return play(
        stages=4, replicas=REPLICAS, forward=FORWARD, backward=BACKWARD, link=LINK, seconds=seconds, kills=kills
    )


@pytest.mark.parametrize("stage", [1, 3])
def test_a_killed_replica_costs_its_share_while_it_is_away(stage: int) -> None:
    """And once it is back it is used again at once, not when those who found it gone dare to try it."""
    killed, at, back, end = stage * REPLICAS + 1, 3.0, 5.0, 8.0
    world = swarm({killed: (at, back)}, seconds=end)
    before, away, after = world.rate(1.0, at), world.rate(at, back), world.rate(back + 1.0, end)
    assert away >= 0.8 * min(before, CAPACITY * (REPLICAS - 1) / REPLICAS)
    assert after >= 0.9 * before
    # What it forwards comes back to it, and is not computed again by a sibling.
    assert world.lives[killed][-1].round.units >= 0.8 * (end - 1.0 - back) * before / REPLICAS
