"""The bench of scale: kills fall where they are said to, and what came back is counted once and within the window."""

from dataclasses import replace

import pytest

from scripts.bench.scale import (
    FULL,
    LINK,
    QUICK,
    ROWS,
    Figures,
    figures_of,
    fits,
    kills_of,
    sized,
    spec_of,
    summary,
    times,
)
from scripts.bench.standin.measured import Counts, Measured, Node

CHURN = next(row for row in ROWS if row.kills)


def node(stage: int, *, held: float = 1.0, done: tuple[tuple[int, float], ...] = (), lives: int = 1) -> Node:
    counts = Counts(units=1, rerouted=0, adopted=0, chased=0, held_seconds=held, busy_seconds=1.1 * held)
    push = {"calls": 30, "sent": 0, "received": 0, "refused": 2, "failed": 0}
    return Node(stage=stage, lives=lives, counts=counts, routes={"forward": push}, depth=4, done=list(done))


def test_times_are_those_of_the_large_model_divided_by_the_scale() -> None:
    forward, backward, step = times(FULL)
    assert len(forward) == len(backward) == FULL.stages
    # 2 FLOPs for each of some 6 billion parameters and 8,192 tokens, at 0.6 of 312 TFLOP/s.
    assert 20 * max(forward) == pytest.approx(2 * 6.5e9 * 8_192 / (0.6 * 312e12), rel=0.1)
    assert backward == pytest.approx([2 * seconds for seconds in forward])
    assert 0 < step < min(forward)
    assert times(replace(FULL, scale=5))[0] == pytest.approx([4 * seconds for seconds in forward])


def test_kills_are_spread_over_the_measurement_and_over_stages() -> None:
    kills = kills_of(FULL, seed=3)
    assert [kill.at for kill in kills] == [25.0, 55.0]
    assert len({kill.node // FULL.replicas for kill in kills}) == len(kills)
    assert kills == kills_of(FULL, seed=3)
    assert kills != kills_of(FULL, seed=4)
    many = kills_of(replace(QUICK, seconds=60), seed=0)
    for start in range(0, 15, QUICK.stages):  # every stage once before any is hit again
        assert {kill.node // QUICK.replicas for kill in many[start : start + 3]} == {0, 1, 2}


def test_rows_differ_in_what_they_are_called_after_only() -> None:
    unlimited, links, churn = (spec_of(QUICK, row, seed=0) for row in ROWS)
    assert {place.link for place in unlimited.nodes} == {None}
    assert {place.link for place in links.nodes + churn.nodes} == {LINK}
    assert not links.kills
    assert churn.kills
    for other in (links, churn):
        same = {"nodes": unlimited.nodes, "kills": unlimited.kills}
        assert other.model_copy(update=same) == unlimited


def test_a_microbatch_counts_once_and_only_within_the_window() -> None:
    spec = spec_of(QUICK, CHURN, seed=0)
    first = Measured(
        window=(2.0, 12.0),
        cpu_seconds=4.0,
        nodes={0: node(0, done=((0, 1.0), (2, 3.0), (4, 11.0))), 2: node(1, held=5.0, lives=2), 4: node(2)},
    )
    second = Measured(
        window=(2.0, 12.0),
        cpu_seconds=6.0,
        nodes={1: node(0, done=((1, 2.0), (2, 4.0), (3, 12.5))), 3: node(1, held=5.0), 5: node(2)},
    )
    found = figures_of(CHURN, spec, [first, second])
    assert found.microbatches_per_second == pytest.approx(3 / 10)  # samples 2, 4 and 1
    assert found.busy == pytest.approx([0.1, 0.5, 0.1])
    assert found.cores_busy == pytest.approx(1.0)
    assert found.late == pytest.approx(0.1)
    assert found.kills == 1
    assert found.refused == 12
    unit = spec.forward[0] + spec.backward[0]
    assert found.of_capacity == pytest.approx(0.3 * unit / 2, rel=0.02)


def rows(unlimited: float, links: float, churn: float, *, cores: float = 1.0, late: float = 0.0) -> dict[str, Figures]:
    rates = {"unlimited": unlimited, "links": links, "churn": churn}
    measured = [Measured(window=(0.0, 1.0), cpu_seconds=cores, nodes={0: node(0)})]
    blank = figures_of(CHURN, spec_of(QUICK, CHURN, seed=0), measured)
    return {name: replace(blank, row=name, microbatches_per_second=rate, late=late) for name, rate in rates.items()}


def test_ratios_are_medians_over_repeats_of_the_last_size() -> None:
    first, last = replace(QUICK, scale=40), QUICK
    found = summary([(first, [rows(9, 1, 1)]), (last, [rows(10, 9, 8), rows(20, 19, 10), rows(10, 5, 9)])])
    assert (found["ratio_links"], found["ratio_churn"], found["scale"]) == (0.9, 0.8, QUICK.scale)


def test_a_swarm_that_keeps_the_cores_busy_shows_the_machine_and_not_the_links() -> None:
    assert fits(rows(1, 1, 1, cores=1.6), 2)
    assert not fits(rows(1, 1, 1, cores=1.7), 2)
    assert not fits(rows(1, 1, 1, late=0.1), 2)
    assert sized(FULL, 5).warm_up == 4 * FULL.warm_up
    assert sized(FULL, 40).warm_up == FULL.warm_up
