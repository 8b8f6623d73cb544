"""What a killed replica costs a swarm: its own share while it is away, and next to nothing before and after."""

from collections.abc import Mapping
from dataclasses import replace

import pytest

from model.config import preset
from scripts.bench.scale import ACCUMULATION, FULL, LINK, MODEL, TOKENS, kills_of, times
from scripts.bench.standin.spec import Boundary, Place, Spec, Steady
from tests.neurons.virtual_swarm import World, play, run

FORWARD, BACKWARD = 0.03, 0.06
REPLICAS = 3
CAPACITY = REPLICAS / (FORWARD + BACKWARD)
"""Microbatches per second that a stage can do."""


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
    assert before >= 0.9 * CAPACITY
    assert away >= 0.8 * min(before, CAPACITY * (REPLICAS - 1) / REPLICAS)
    assert after >= 0.9 * before
    # What it forwards comes back to it, and is not computed again by a sibling.
    assert world.lives[killed][-1].round.units >= 0.8 * (end - 1.0 - back) * before / REPLICAS


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("killed", "least"), [(False, 0.95), (True, 0.90)])
def test_forty_eight_miners_lose_little_to_links_and_to_a_kill_every_half_minute(killed: bool, least: float) -> None:
    """The stages of the 100b plan, 20 times as fast, over the links of the published run. Real sockets need more cores
    for that than most machines have; `python -m scripts.bench.scale --scales 1` has them in real time."""
    size = replace(FULL, warm_up=15.0, seconds=60.0)
    forward, backward, step = times(size)
    spec = Spec(
        stages=size.stages,
        replicas=size.replicas,
        forward=forward,
        backward=backward,
        step=step,
        accumulation=ACCUMULATION,
        boundary=Boundary(batch=1, sequence=8, width=4),
        nodes=[Place(host="127.0.0.1", port=1 + node) for node in range(size.stages * size.replicas)],
        steady=Steady(warm_up=size.warm_up, seconds=size.seconds),
    )
    kills = {kill.node: (kill.at, kill.at + kill.back_after) for kill in kills_of(size, seed=0)} if killed else {}
    crossing = round(2 * TOKENS * preset(MODEL).boundary_width / size.scale)
    end = size.warm_up + size.seconds
    world = run(spec, LINK, seconds=end, kills=kills, boundary_bytes=crossing)
    slowest = max(f + b + step / ACCUMULATION for f, b in zip(forward, backward, strict=True))
    assert world.rate(size.warm_up, end) >= least * size.replicas / slowest
