"""A simulated swarm against what is published, what is conserved and what must follow from its shape."""

from __future__ import annotations

from dataclasses import replace

import pytest

from scripts.simulate.accounts import Idle, Timeline
from scripts.simulate.setting import Churn, Rounds, Setting, SettingError, Wires
from scripts.simulate.swarm import Failure, _Swarm, simulate
from subnet.swarm.pace import Pipeline, Replica, Routing

BOUNDARY = 2_359_296
"""Bytes of 8,192 tokens, 144 wide, in bf16."""


def pipeline(stages: int = 4, replicas: int = 2, *, forward: float = 0.5, depth: int | None = None) -> Pipeline:
    """Backward three times as long as forward, links of the published run."""
    replica = Replica(forward=forward, backward=3 * forward, up=856e6, down=1322e6)
    return Pipeline(
        stages=((replica,) * replicas,) * stages,
        forward_bytes=BOUNDARY,
        backward_bytes=BOUNDARY,
        latency=0.03,
        depth=2 * stages if depth is None else depth,
        routing=Routing.LOTTERY,
    )


@pytest.mark.parametrize(("depth", "published"), [(8, 19.7), (16, 12.2), (24, 11.1)])
def test_the_published_benchmark(depth: int, published: float) -> None:
    """8 stages, 200 Mbit/s and 50 ms on every link, 32 microbatches of 0.211 s to send, F + B = 0.1 s: 1F1B, which
    keeps 8 in flight, takes 19.7 to 19.9 s."""
    size = round(0.211 * 200e6 / 8)
    swarm = Pipeline(
        stages=((Replica(forward=0.1 / 3, backward=0.2 / 3, up=200e6, down=200e6),),) * 8,
        forward_bytes=size,
        backward_bytes=size,
        latency=0.05,
        depth=depth,
        routing=Routing.LANES,
    )
    result = simulate(Setting(pipeline=swarm, seconds=60, wires=Wires.PAIR, microbatches=32, jitter=0))
    assert len(result.completed) == 32
    assert result.completed[-1] == pytest.approx(published, rel=0.03)


def test_one_stage_computes_all_the_time() -> None:
    result = simulate(Setting(pipeline=pipeline(stages=1, replicas=1), seconds=600))
    assert result.utilisation == pytest.approx(1.0)
    assert len(result.completed) == pytest.approx(300, rel=0.02)


def test_the_same_seed_gives_the_same_run_and_another_one_another() -> None:
    swarm = Setting(
        pipeline=pipeline(),
        seconds=600,
        churn=Churn(failures_per_hour=30, ready_after=60),
        rounds=Rounds(length=200, close=180),
        measured_depth=True,
    )
    assert simulate(swarm) == simulate(swarm)
    assert simulate(swarm).completed != simulate(replace(swarm, seed=1)).completed


@pytest.mark.parametrize("seed", range(4))
def test_every_microbatch_ends_once(seed: int) -> None:
    swarm = Setting(
        pipeline=pipeline(stages=3, replicas=3, forward=0.2),
        seconds=600,
        churn=Churn(failures_per_hour=90, ready_after=60),
        rounds=Rounds(length=100, close=90),
        seed=seed,
    )
    result = simulate(swarm)
    assert result.failures
    assert result.started == len(result.completed) + result.lost + result.in_flight
    for stage in result.stages:
        assert stage.total == pytest.approx(3 * 600)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_dead_replica_loses_no_microbatch_but_its_share(stage: int) -> None:
    """One of three dies in mid-round: its siblings compute its units, as fast as two can, and nothing is lost."""
    calm = Setting(pipeline=pipeline(stages=3, replicas=3, forward=0.2), seconds=400)
    shaken = simulate(calm, failures=[Failure(200.0, stage, 0)])
    assert shaken.lost == 0
    before, after, unit = shaken.rate(50, 200), shaken.rate(240), 0.8
    assert 0.95 * 2 / 3 * before < after < 1.02 * 2 / unit
    assert shaken.stages[stage].idle[Idle.DEAD] == pytest.approx(200)
    assert shaken.started == len(shaken.completed) + shaken.in_flight


def test_a_newcomer_works_from_the_second_round_after_it_came() -> None:
    """Dead at 50, there at 110, joins with the round of 200, works from 300 on."""
    swarm = Setting(
        pipeline=pipeline(stages=2, replicas=2, forward=0.2),
        seconds=400,
        churn=Churn(ready_after=60),
        rounds=Rounds(length=100, close=95),
    )
    result = simulate(swarm, failures=[Failure(50.0, 1, 1)])
    assert result.stages[1].idle[Idle.DEAD] == pytest.approx(250)
    assert result.rate(310, 390) == pytest.approx(result.rate(10, 45), rel=0.05)


def test_a_round_in_which_a_stage_has_nobody_stands_still_whoever_dies_in_it() -> None:
    """Stage 1 is gone from 50 on, its newcomer works from 300 on; in the round between a head dies too."""
    swarm = Setting(
        pipeline=pipeline(stages=3, replicas=2, forward=0.2),
        seconds=400,
        churn=Churn(ready_after=60),
        rounds=Rounds(length=100, close=95),
    )
    result = simulate(swarm, failures=[Failure(50.0, 1, 0), Failure(51.0, 1, 1), Failure(210.0, 0, 0)])
    assert result.rate(200, 300) == 0
    assert result.rate(310, 390) > 0
    assert result.started == len(result.completed) + result.lost + result.in_flight


def test_a_narrow_stage_is_kept_busy_with_fewer_in_flight() -> None:
    """Of four replicas three are gone from one stage: four heads share what one of them would keep in flight, the last
    replica never waits, and what is started late in a round comes back before it closes."""
    swarm = Setting(
        pipeline=pipeline(stages=3, replicas=4, forward=0.2),
        seconds=400,
        churn=Churn(ready_after=1e6),
        rounds=Rounds(length=100, close=95),
        measured_depth=True,
    )
    result = simulate(swarm, failures=[Failure(50.0, 1, place) for place in range(3)])
    assert result.depth <= 2
    assert result.rate(120, 180) == pytest.approx(1 / 0.8, rel=0.03)
    assert result.lost <= 4


def test_who_is_dead_stays_down_though_nobody_pushes_to_it() -> None:
    """It is asked whether it is back for as long as the round lasts."""
    few = Setting(pipeline=pipeline(stages=3, replicas=2, forward=0.2), seconds=400, microbatches=20)
    swarm = _Swarm(few, Timeline(), [Failure(8.0, 1, 0)], ())
    dead, before = swarm.places[1][0], swarm.places[0][0]
    down: list[bool] = []
    for moment in range(100, 400, 3):
        swarm.clock.at(float(moment), lambda: down.append(before.is_down(dead, swarm.clock.now)))
    result = swarm.run()
    assert len(result.completed) == result.started == 40
    assert result.completed[-1] < 100
    assert len(down) == 100
    assert all(down)


def test_unequal_replicas_share_by_speed() -> None:
    """At saturation one at half the speed does half as much, and a stage is as fast as its replicas together."""
    even = pipeline(stages=3, replicas=2, forward=0.2, depth=16)
    fast, slow = even.stages[1][0], replace(even.stages[1][0], forward=0.4, backward=1.2)
    uneven = replace(even, stages=(even.stages[0], (fast, slow), even.stages[2]))
    result = simulate(Setting(pipeline=uneven, seconds=500))
    assert result.rate(100) == pytest.approx(1.5 / 0.8, rel=0.05)
    assert result.stages[1].utilisation > 0.93


def test_thousands_of_nodes() -> None:
    swarm = pipeline(stages=64, replicas=64, forward=0.1)
    result = simulate(Setting(pipeline=swarm, seconds=120, microbatches=2))
    assert result.started == 2 * 64
    assert len(result.completed) == result.started


def test_a_setting_that_makes_no_sense_is_refused() -> None:
    calm = Setting(pipeline=pipeline(), seconds=600)
    with pytest.raises(SettingError, match="--failures-per-hour is -1"):
        replace(calm, churn=Churn(failures_per_hour=-1))
    with pytest.raises(SettingError, match="a round trains 90 s of its 80"):
        replace(calm, rounds=Rounds(length=80, close=90))
    uneven = replace(calm.pipeline, stages=(*calm.pipeline.stages[:3], calm.pipeline.stages[3][:1]))
    with pytest.raises(SettingError, match=r"stages have \[1, 2\] replicas"):
        replace(calm, pipeline=uneven)
