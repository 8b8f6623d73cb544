"""What trust costs: the arithmetic of the plan, by hand for one stage and by how it answers to its numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from model.accounting import stage_flops, stage_parameters
from model.config import preset
from model.split import split
from subnet.trust.audit import POOL
from subnet.trust.cost import PIECE_PARTS, CostError, Rules, Shape, cost, most_drawn
from subnet.trust.heads import HEAD_BYTES
from subnet.trust.ledger import LEAF_BYTES
from subnet.trust.tree import PIECE_BYTES

SHAPE = Shape(
    model=preset("100b"),
    stages=16,
    replicas=3,
    batch=1,
    sequence=8192,
    accumulation=64,
    microbatch_seconds=2.5,
    round_seconds=3600.0,
    optimizer="adamw",
    weight_bytes=2,
    wire_bytes=2,
)
RULES = Rules(
    slot_seconds=180.0,
    delay_seconds=48.0,
    windows=0.1,
    share=0.01,
    steps=0.15,
    pieces=4,
    validators=4,
    readers=1.0,
    delta=1.0,
)


def test_a_body_stage_by_hand() -> None:
    plan = split(SHAPE.model, 16)[8]
    load = cost(SHAPE, RULES).stages[8]
    weights, boundary = 2 * stage_parameters(SHAPE.model, plan), 8192 * 144 * 2
    tensors = 64 * 4 * boundary
    pending = 3 * (3 * weights + tensors)  # (180 + 48) / 160 is 1.4: two, and the open one
    assert load.pending_bytes == pending + weights  # from before a merge
    assert load.cut_bytes == 3 * weights
    assert load.host_bytes == load.pending_bytes + load.cut_bytes
    kept = 11 + 2  # 40 slots of two hours have 4 on average, at most 11 in 99.96 % of the cases; and two merges
    assert load.picked_bytes == kept * (weights + tensors + POOL * PIECE_PARTS * PIECE_BYTES)
    assert load.cuts_bytes == 2 * 3 * weights
    assert load.disk_bytes == load.picked_bytes + load.cuts_bytes
    forward, backward = (8192 * flops for flops in stage_flops(SHAPE.model, plan, tokens=8192))
    assert load.training_flops == pytest.approx(1440 * (forward + backward))
    units = 0.01 * 1440 * (forward + (forward + backward))
    assert load.audit_flops == pytest.approx(units + 2 * 0.15 * 64 * (forward + backward))
    assert load.training_bytes == 1440 * 2 * boundary
    assert load.table_bytes == pytest.approx(4 * (2880 * LEAF_BYTES + 22.5 * HEAD_BYTES))
    assert load.unit_bytes == pytest.approx((0.01 * 2880 * 2.5 + 2 * 0.15 * 64 * 2) * boundary)
    assert load.weight_bytes == pytest.approx(2 * (1 - 160 / 3600) * weights)
    assert load.piece_bytes == 2 * 4 * PIECE_PARTS * PIECE_BYTES


def test_muon_keeps_fewer_moments_and_shows_a_matrix() -> None:
    """Of the seven of a block, and three of the boundaries, one is looked at in each window that is read."""
    before, after = cost(SHAPE, RULES).stages[8], cost(replace(SHAPE, optimizer="muon"), RULES).stages[8]
    matrices = 6 * [(9216, 9216), (9216, 9216), (1024, 9216), (1024, 9216)] + 18 * [(9216, 32256)]
    matrices += 2 * [(144, 9216)] + [(1152, 9216)]
    values = [m * n for m, n in matrices]
    assert before.pending_bytes - after.pending_bytes == 3 * 2 * sum(values)
    assert after.picked_bytes - before.picked_bytes == 13 * 2 * 2 * max(values)
    assert after.piece_bytes - before.piece_bytes == pytest.approx(2 * 2 * 2 * sum(values) / 45)
    flops = sum(5 * (4 * m * m * n + 2 * m**3) for m, n in matrices) / 45
    assert after.audit_flops - before.audit_flops == pytest.approx(2 * flops, rel=1e-4)
    assert after.cut_bytes == before.cut_bytes


@pytest.mark.parametrize(
    ("trials", "chance", "hits"),
    [(40, 0.1, 11), (40, 0.0, 0), (1, 0.5, 1), (20_000, 0.5, 10_219), (3, 0.0001, 0), (10, 0.999, 10)],
)
def test_room_is_for_what_is_hardly_ever_exceeded(trials: int, chance: float, hits: int) -> None:
    assert most_drawn(trials, chance) == hits


def test_whole_windows_of_a_slot_are_not_drawn() -> None:
    """Two and a half in each of 40 slots."""
    shape = replace(SHAPE, accumulation=8)
    assert cost(shape, replace(RULES, windows=2.5)).picked_kept == 2 + 2 * 40 + most_drawn(40, 0.5)
    assert cost(shape, replace(RULES, windows=2.0)).picked_kept == 2 + 2 * 40


def test_shares_are_of_the_whole_swarm() -> None:
    whole = cost(SHAPE, RULES)
    assert whole.picked_per_hour == pytest.approx(2.0)
    assert whole.flops_share == pytest.approx(
        sum(load.audit_flops for load in whole.stages) / sum(load.training_flops for load in whole.stages)
    )
    assert whole.audit_bytes == pytest.approx(3 * sum(load.audit_bytes for load in whole.stages))
    assert cost(replace(SHAPE, replicas=1), RULES).flops_share == pytest.approx(whole.flops_share)


def test_what_is_saved_where() -> None:
    whole = cost(SHAPE, RULES)
    short = cost(SHAPE, replace(RULES, slot_seconds=90.0, windows=0.05))
    assert short.picked_per_hour == whole.picked_per_hour
    assert short.largest.pending_bytes < whole.largest.pending_bytes, "short slots keep less until the seed is known"
    packed = cost(SHAPE, replace(RULES, delta=0.3))
    assert packed.stages[8].weight_bytes == pytest.approx(0.3 * whole.stages[8].weight_bytes)
    idle = cost(SHAPE, replace(RULES, share=0.0, steps=0.0))
    assert idle.flops_share == 0
    assert cost(replace(SHAPE, stages=1), RULES).bytes_share == float("inf"), "nothing is sent to train"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"accumulation": 0}, "accumulation is 0; it must be at least 1"),
        ({"microbatch_seconds": 0.0}, "microbatch_seconds is 0.0"),
        ({"accumulation": 2000}, "a local step takes 5000 s, a round 3600 s"),
        ({"windows": 0.0}, "windows is 0.0"),
        ({"share": 1.5}, "share is 1.5; it must be from 0 to 1"),
        ({"pieces": -1}, "pieces is -1"),
        ({"windows": 2.0}, "40 windows are picked in an hour that has 22"),
    ],
)
def test_numbers_that_describe_no_run_are_named(change: dict[str, Any], words: str) -> None:
    of_shape = {name: value for name, value in change.items() if name in Shape.__dataclass_fields__}
    of_rules = {name: value for name, value in change.items() if name in Rules.__dataclass_fields__}
    with pytest.raises(CostError, match=words):
        cost(replace(SHAPE, **of_shape), replace(RULES, **of_rules))
