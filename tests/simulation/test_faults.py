"""Schedules: a function of the seed, survivable, and cut down to what a failure takes."""

from collections.abc import Sequence

import numpy as np
import pytest

from scripts.sim.command import SimError, SimOptions, least
from scripts.sim.faults import AWAY, MERGE_SECONDS, QUIET_FROM, Fault, Kind, draw

GROUPS = [["a0", "a1"], ["b0", "b1", "b2"], ["v0", "v1", "v2"]]
NEWCOMERS = ["n0"]


def drawn(seed: int) -> list[Fault]:
    return draw(np.random.default_rng(seed), GROUPS, NEWCOMERS, begin=40.0, end=1000.0)


def test_a_seed_draws_the_same_and_survivable_faults() -> None:
    kinds, struck = set(), set()
    for seed in range(300):
        faults = drawn(seed)
        assert faults == drawn(seed)
        kinds |= {fault.kind for fault in faults}
        for fault in faults:
            struck |= {*fault.nodes}
            assert 40.0 <= fault.at <= fault.ends <= 40.0 + QUIET_FROM * 960.0 + 0.001
            away = {
                name
                for other in faults
                if other.kind in AWAY
                and other.at <= fault.at
                and (fault.at < other.ends + MERGE_SECONDS or other.kind is Kind.LEAVE)
                for name in other.nodes
            }
            assert all(not away.issuperset(group) for group in GROUPS[:2]), (seed, fault)
            assert len(away & {*GROUPS[2]}) <= 1, (seed, fault)
            assert fault.kind is not Kind.LEAVE or not {*fault.nodes} & {*GROUPS[2]}
    assert kinds == {*Kind} - {Kind.FULL}
    assert struck == {*NEWCOMERS}.union(*GROUPS)


def test_a_schedule_is_written_and_read_back() -> None:
    for fault in drawn(3):
        assert Fault.of(fault.row()) == fault


def test_what_a_failure_does_not_need_is_left_out() -> None:
    faults = [Fault(Kind.KILL, float(number), 1.0, (f"n{number}",)) for number in range(13)]
    needed = {faults[2], faults[11]}
    tried: list[int] = []

    def fails(kept: Sequence[Fault]) -> bool:
        tried.append(len(kept))
        return needed <= {*kept}

    assert {*least(faults, fails)} == needed
    assert len(tried) < 40
    assert least(faults, lambda _kept: False) == faults


@pytest.mark.parametrize(("text", "seeds"), [("3-5", [3, 4, 5]), ("7", [7]), (None, [2])])
def test_seeds_are_read(text: str | None, seeds: list[int]) -> None:
    assert list(options(text).range()) == seeds


@pytest.mark.parametrize("text", ["", "a", "5-3", "-1", "1-x", "1-2-3"])
def test_what_is_no_range_is_refused(text: str) -> None:
    with pytest.raises(SimError, match="--seeds"):
        options(text).range()


def options(seeds: str | None) -> SimOptions:
    return SimOptions(
        seed=2,
        seeds=seeds,
        jobs=1,
        minutes=1.0,
        stages=2,
        replicas=1,
        joiners=0,
        validators=1,
        calm=False,
        faults=None,
        trace=None,
        log=None,
        shrink=None,
    )
