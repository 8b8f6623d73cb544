"""A simulated swarm against what is published, what is conserved and what must follow from its shape."""

from __future__ import annotations

from dataclasses import replace

import pytest

from scripts.simulate.accounts import Idle
from scripts.simulate.setting import Churn, Lines, Rounds, Setting, SettingError, StageTime, Wires
from scripts.simulate.swarm import Failure, simulate

LINES = Lines(up=856e6, down=1322e6, latency=0.03)
BOUNDARY = 2_359_296
"""Bytes of 8,192 tokens, 144 wide, in bf16."""


def setting(stages: int = 4, replicas: int = 2, *, seconds: float = 600.0, forward: float = 0.5) -> Setting:
    return Setting(
        stages=(StageTime(forward=forward, backward=3 * forward),) * stages,
        replicas=replicas,
        boundary_bytes=BOUNDARY,
        seconds=seconds,
        lines=LINES,
    )


@pytest.mark.parametrize(("depth", "published"), [(8, 19.7), (16, 12.2), (24, 11.1)])
def test_the_published_benchmark(depth: int, published: float) -> None:
    """8 stages, 200 Mbit/s and 50 ms on every link, 32 microbatches of 0.211 s to send, F + B = 0.1 s: 1F1B, which
    keeps 8 in flight, takes 19.7 to 19.9 s."""
    benchmark = Setting(
        stages=(StageTime(forward=0.1 / 3, backward=0.2 / 3),) * 8,
        replicas=1,
        boundary_bytes=round(0.211 * 200e6 / 8),
        seconds=60,
        lines=Lines(up=200e6, down=200e6, latency=0.05, wires=Wires.PAIR),
        depth=depth,
        microbatches=32,
    )
    result = simulate(benchmark)
    assert len(result.completed) == 32
    assert result.completed[-1] == pytest.approx(published, rel=0.03)


def test_one_stage_computes_all_the_time() -> None:
    result = simulate(setting(stages=1, replicas=1))
    assert result.utilisation == pytest.approx(1.0)
    assert len(result.completed) == 300


def test_the_same_seed_gives_the_same_run_and_another_one_another() -> None:
    swarm = replace(
        setting(), churn=Churn(failures_per_hour=30, replaced_after=60), rounds=Rounds(length=200, close=180)
    )
    assert simulate(swarm) == simulate(swarm)
    assert simulate(swarm).completed != simulate(replace(swarm, seed=1)).completed


@pytest.mark.parametrize("seed", range(4))
def test_every_microbatch_ends_once(seed: int) -> None:
    swarm = replace(
        setting(stages=3, replicas=3, seconds=400, forward=0.2),
        churn=Churn(failures_per_hour=90, replaced_after=60),
        rounds=Rounds(length=100, close=90),
        seed=seed,
    )
    result = simulate(swarm)
    assert result.failures
    assert result.started == len(result.completed) + result.lost + result.in_flight
    for stage in result.stages:
        assert stage.total == pytest.approx(3 * 400)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_dead_replica_loses_no_microbatch_but_its_share(stage: int) -> None:
    """One of three dies in mid-round: its siblings compute its units, as fast as two can, and nothing is lost."""
    calm = setting(stages=3, replicas=3, seconds=400, forward=0.2)
    shaken = simulate(calm, failures=[Failure(200.0, stage, 0)])
    assert shaken.lost == 0
    before, after, unit = shaken.rate(50, 200), shaken.rate(240), 0.8
    assert 0.95 * 2 / 3 * before < after < 1.02 * 2 / unit
    assert shaken.stages[stage].idle[Idle.DEAD] == pytest.approx(200)
    assert shaken.started == len(shaken.completed) + shaken.in_flight


def test_unequal_replicas_share_by_speed() -> None:
    """At saturation one at half the speed does half as much, and a stage is as fast as its replicas together."""
    slow = replace(
        setting(stages=3, replicas=2, seconds=500, forward=0.2), speeds=((1.0, 1.0), (1.0, 0.5), (1.0, 1.0)), depth=16
    )
    result = simulate(slow)
    assert result.rate(100) == pytest.approx(1.5 / 0.8, rel=0.05)
    assert result.stages[1].utilisation > 0.93


def test_a_narrow_uplink_binds() -> None:
    """A body sends an activation and a gradient for every microbatch through one uplink."""
    narrow = replace(setting(forward=0.05), lines=Lines(up=8 * BOUNDARY / 0.4, down=1e9, latency=0.03), depth=30)
    assert simulate(narrow).rate(100) == pytest.approx(2 / 0.8, rel=0.03)


def test_thousands_of_nodes() -> None:
    swarm = setting(stages=16, replicas=256, seconds=20, forward=0.25)
    result = simulate(swarm)
    assert result.started > 256 * 16
    assert result.started == len(result.completed) + result.in_flight
    assert result.completed


def test_a_setting_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(SettingError, match="--up in bit/s is 0"):
        replace(setting(), lines=replace(LINES, up=0.0))
    with pytest.raises(SettingError, match="--replicas is 0"):
        replace(setting(), replicas=0)
