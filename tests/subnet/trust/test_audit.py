"""Replay convicts what was not computed with the committed weights, and agrees with what was."""

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.config import BoundaryConfig, BoundaryForm
from model.engine import replay_backward, replay_forward, replay_tail
from model.split import split
from model.stage import Stage, build_stage
from subnet.trust.audit import (
    POOL,
    UnitTensors,
    budget,
    comparable,
    increment_error,
    pick_windows,
    reads_window,
    replay,
    replays_step,
    select_pieces,
    select_pool,
    select_units,
    select_windows,
    spread,
)
from subnet.trust.finding import Check, Finding, Grade
from subnet.trust.heads import WindowHead
from subnet.trust.ledger import Direction, Leaf
from tests.neurons.swarm import tiny
from tests.subnet.trust.books import sound

CONFIG = tiny(boundary=BoundaryConfig(form=BoundaryForm.A, width=8))
TOLERANCE = 0.02


def stages() -> list[Stage]:
    return [build_stage(CONFIG, plan, 3) for plan in split(CONFIG, 3)]


def leaf(direction: Direction, *, stage: int, sample: int = 0, version: int = 0, loss: float = 0.0) -> Leaf:
    return Leaf(direction=direction, stage=stage, sample=sample, version=version, loss=loss)


def body_unit() -> tuple[Stage, torch.Tensor, torch.Tensor]:
    """A body stage and one unit's x and g, as they cross the wire."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 32, 8, generator=generator).to(torch.bfloat16)
    g = (torch.randn(4, 32, 8, generator=generator) * 1e-3).to(torch.bfloat16)
    return stages()[1], x, g


def audit(stage: Stage, direction: Direction, x: torch.Tensor, g: torch.Tensor | None, output: torch.Tensor) -> Finding:
    (found,) = replay(
        stage,
        leaf(direction, stage=1, sample=5, version=2),
        UnitTensors(x, g, output.to(torch.bfloat16)),
        targets=None,
        accumulation=1,
        tolerance=lambda _: TOLERANCE,
        hotkey="miner",
        number=4,
    )
    return found


def test_honest_units_pass() -> None:
    stage, x, g = body_unit()
    forward = audit(stage, Direction.FORWARD, x, None, replay_forward(stage, x.float()))
    dx = replay_backward(stage, x.float(), g.float())
    assert dx is not None
    backward = audit(stage, Direction.BACKWARD, x, g, dx)
    for found, check in ((forward, Check.FORWARD), (backward, Check.BACKWARD)):
        assert found.passed
        assert found.error <= TOLERANCE == found.tolerance
        assert (found.check, found.grade, found.reason) == (check, Grade.MEASUREMENT, "")
        assert (found.hotkey, found.round, found.stage, found.version, found.sample) == ("miner", 4, 1, 2, 5)


@pytest.mark.parametrize("cheat", ["pass-through", "noise", "other weights", "stale input", "half layers"])
def test_cheating_forwards_fail(cheat: str) -> None:
    stage, x, _ = body_unit()
    y = replay_forward(stage, x.float())
    generator = torch.Generator().manual_seed(7)
    noise = torch.randn(y.shape, generator=generator)
    wrong = {
        "pass-through": x.float(),
        "noise": y + 0.05 * (y - x.float()).norm(dim=-1, keepdim=True) * noise / 8**0.5,
        "other weights": replay_forward(build_stage(CONFIG, stage.plan, 4), x.float()),
        "stale input": replay_forward(stage, x.float().flip(0)),
        "half layers": x.float() + 0.5 * (y - x.float()),
    }[cheat]
    found = audit(stage, Direction.FORWARD, x, None, wrong)
    assert not found.passed
    assert found.error > TOLERANCE
    assert "0.02" in found.reason


@pytest.mark.parametrize("value", [math.nan, math.inf, 3e38])
def test_what_cannot_be_compared_fails_with_an_infinite_error(value: float) -> None:
    stage, x, _ = body_unit()
    y = replay_forward(stage, x.float()).to(torch.bfloat16)
    y[0, 0, 0] = value
    assert audit(stage, Direction.FORWARD, x, None, y).error > 1e6
    assert not audit(stage, Direction.FORWARD, x, None, y).passed
    assert audit(stage, Direction.FORWARD, x * math.nan, None, y).error == math.inf


def test_a_cosine_of_ninety_percent_does_not_pass() -> None:
    stage, x, _ = body_unit()
    y = replay_forward(stage, x.float())
    noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(7))
    noisy = y + 0.48 * noise * y.norm() / noise.norm()
    assert torch.cosine_similarity(noisy.flatten(), y.flatten(), dim=0) > 0.89
    assert not audit(stage, Direction.FORWARD, x, None, noisy).passed


def test_scaled_gradient_fails() -> None:
    stage, x, g = body_unit()
    dx = replay_backward(stage, x.float(), g.float())
    assert dx is not None
    assert not audit(stage, Direction.BACKWARD, x, g, g.float() + 1.5 * (dx - g.float())).passed


@pytest.mark.parametrize("direction", [Direction.FORWARD, Direction.BACKWARD])
def test_who_sends_nothing_on_must_have_had_nothing_that_can_be_sent(direction: Direction) -> None:
    stage, x, g = body_unit()
    for scale, passes in ((1.0, False), (math.nan, True), (1e12, True)):
        gradient = g if direction is Direction.FORWARD else g * scale
        activation = x * scale if math.isnan(scale) else x
        if direction is Direction.FORWARD and scale == 1e12:
            continue  # a norm brings it back
        (found,) = replay(
            stage,
            leaf(direction, stage=1, sample=5, version=2),
            UnitTensors(activation, gradient, None),
            targets=None,
            accumulation=1,
            tolerance=lambda _: TOLERANCE,
            hotkey="miner",
            number=4,
        )
        assert found.passed is passes
        assert found.error == (0.0 if passes else math.inf)


def test_a_tail_that_lies_about_its_loss_fails() -> None:
    tail = stages()[2]
    _, x, _ = body_unit()
    targets = torch.randint(0, CONFIG.vocab, (4, 32), generator=torch.Generator().manual_seed(2))
    loss, dx = replay_tail(tail, x.float(), targets, accumulation=2)
    assert dx is not None
    for claimed, passes in ((loss, True), (loss * 0.9, False), (loss * 1.05, False)):
        said, sent = replay(
            tail,
            leaf(Direction.BACKWARD, stage=2, loss=claimed),
            UnitTensors(x, None, dx.to(torch.bfloat16)),
            targets=targets,
            accumulation=2,
            tolerance=lambda _: TOLERANCE,
            hotkey="miner",
            number=0,
        )
        assert (said.check, sent.check) == (Check.LOSS, Check.BACKWARD)
        assert said.passed is passes, said.reason
        assert sent.passed


def test_a_head_sends_no_gradient_so_its_backward_compares_nothing() -> None:
    head = stages()[0]
    tokens = torch.randint(0, CONFIG.vocab, (4, 32), generator=torch.Generator().manual_seed(2))
    unit = leaf(Direction.BACKWARD, stage=0)
    assert not comparable(head.plan, unit)
    assert comparable(head.plan, leaf(Direction.FORWARD, stage=0))
    assert all(comparable(stage.plan, leaf(way, stage=1)) for stage in stages()[1:] for way in Direction)
    found = replay(
        head,
        unit,
        UnitTensors(tokens, torch.zeros(4, 32, 8, dtype=torch.bfloat16), None),
        targets=None,
        accumulation=1,
        tolerance=lambda _: TOLERANCE,
        hotkey="miner",
        number=0,
    )
    assert found == ()


def test_increments_are_judged_not_outputs() -> None:
    generator = torch.Generator().manual_seed(3)
    carried = torch.randn(1, 100, 8, generator=generator) * 100
    replayed = carried + torch.randn(1, 100, 8, generator=generator)
    assert torch.cosine_similarity(carried.flatten(), replayed.flatten(), dim=0) > 0.999
    assert increment_error(carried, replayed, carried) == pytest.approx(1.0, abs=1e-3)


def test_where_nothing_is_carried_the_whole_output_is_judged() -> None:
    """Form T: the same channels mean something else at each boundary, so taking the input off would say nothing."""
    config = tiny(boundary=BoundaryConfig(form=BoundaryForm.T, width=8, rank=4))
    stage = build_stage(config, split(config, 3)[1], 3)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, config.vocab, (4, 32), generator=generator)
    y = replay_forward(stage, torch.randn(4, 32, 8, generator=generator), tokens)
    off = 1.25 * y
    (found,) = replay(
        stage,
        leaf(Direction.FORWARD, stage=1),
        UnitTensors(100 * y, None, off),
        tokens=tokens,
        targets=None,
        accumulation=1,
        tolerance=lambda _: TOLERANCE,
        hotkey="miner",
        number=0,
    )
    assert not found.passed
    exact = replay_forward(stage, 100 * y, tokens)
    assert found.error == pytest.approx(increment_error(off, exact, None), rel=1e-3)


def head(version: int, slot: int) -> WindowHead:
    return WindowHead(
        version=version,
        steps=version,
        slot=slot,
        forward=4,
        backward=4,
        merged=0,
        weights=bytes(32),
        optimizer=bytes(32),
        units=bytes(32),
        next_weights=bytes(32),
        next_optimizer=bytes(32),
    )


def test_the_public_seed_picks_windows_of_its_slot_alone() -> None:
    heads = [head(version, version // 8) for version in range(16)]
    picks = Counter(
        select_windows(heads, seed=bytes([seed]), hotkey="m", slot=1, count=1)[0].version for seed in range(200)
    )
    assert set(picks) == set(range(8, 16))
    assert max(picks.values()) < 60
    whole = select_windows(heads, seed=b"s", hotkey="m", slot=0, count=99)
    assert {one.version for one in whole} == set(range(8))
    assert select_windows(heads, seed=b"s", hotkey="m", slot=0, count=3) == whole[:3]
    assert select_windows(heads, seed=b"s", hotkey="m", slot=7, count=3) == ()
    assert select_windows(heads, seed=b"s", hotkey="n", slot=0, count=8) != whole


def test_a_fraction_of_a_window_is_the_chance_of_one() -> None:
    heads = [head(version, version) for version in range(400)]
    seeds = [slot.to_bytes(2, "little") for slot in range(400)]
    few = pick_windows(heads, seeds=seeds, hotkey="m", count=0.1)
    assert 20 < len(few) < 65
    assert len(pick_windows(heads, seeds=seeds, hotkey="m", count=1.0)) == 400
    crowd = [head(version, 0) for version in range(9)]
    sizes = Counter(len(select_windows(crowd, seed=seed, hotkey="m", slot=0, count=2.5)) for seed in seeds)
    assert set(sizes) == {2, 3}
    assert 150 < sizes[3] < 250
    picked = select_windows(crowd, seed=b"s", hotkey="m", slot=0, count=2.0)
    assert picked == select_windows(crowd, seed=b"s", hotkey="m", slot=0, count=3.0)[:2]


def test_who_looks_into_a_window_is_decided_by_a_secret_in_proportion() -> None:
    def read(secret: bytes, share: float) -> set[int]:
        heads = [head(version, 0) for version in range(400)]
        return {one.version for one in heads if reads_window(one, secret=secret, seed=b"s", hotkey="m", share=share)}

    assert 60 < len(read(b"a", 0.25)) < 140
    assert read(b"a", 0.25) < read(b"a", 0.5)
    assert len(read(b"a", 1.0)) == 400
    assert 60 < len(read(b"a", 0.5) & read(b"b", 0.5)) < 140, "independently"


def test_the_secret_picks_units_of_the_window_and_nobody_without_it_can() -> None:
    leaves = [leaf(Direction.FORWARD, stage=1, sample=sample, version=sample // 8) for sample in range(64)]
    table = sound(leaves)
    window = table.heads[3]

    def pick(secret: bytes, count: int = 3) -> tuple[Leaf, ...]:
        return select_units(table, window, secret=secret, seed=b"s", hotkey="m", count=count)

    one, two = pick(b"1"), pick(b"2")
    assert {entry.version for entry in (*one, *two)} == {3}
    assert one != two
    assert one == pick(b"1")
    assert pick(b"1", 5)[:3] == one
    assert set(pick(b"1", 99)) == set(table.window(3))
    even = select_units(
        table, window, secret=b"1", seed=b"s", hotkey="m", count=9, fits=lambda unit: unit.sample % 2 == 0
    )
    assert {unit.sample for unit in even} == {24, 26, 28, 30}


def test_a_share_of_windows_has_its_step_replayed() -> None:
    taken = [replays_step(head(version, 0), secret=b"x", seed=b"s", hotkey="m", share=0.25) for version in range(2000)]
    assert sum(taken) == pytest.approx(500, abs=80)
    assert all(replays_step(head(version, 0), secret=b"x", seed=b"s", hotkey="m", share=1.0) for version in range(99))


@given(st.sets(st.integers(0, 999), max_size=50), st.integers(0, 50), st.binary(max_size=4))
def test_pieces_are_different_and_of_the_pool(pool: set[int], count: int, secret: bytes) -> None:
    pieces = select_pieces(sorted(pool), secret=secret, seed=b"s", hotkey="m", label="w", count=count)
    assert len(pieces) == len(set(pieces)) == min(len(pool), count)
    assert set(pieces) <= pool
    assert list(pieces) == sorted(pieces)


def test_a_secret_draws_every_piece_of_a_pool_alike() -> None:
    pool = (3, 50, 51, 700)
    drawn = Counter(
        piece
        for secret in range(4000)
        for piece in select_pieces(pool, secret=b"%d" % secret, seed=b"s", hotkey="m", label="w", count=1)
    )
    assert drawn.keys() == set(pool)
    assert all(count == pytest.approx(1000, abs=130) for count in drawn.values())


@given(st.integers(0, 3 * POOL), st.binary(max_size=4), st.integers(0, 9))
def test_a_pool_has_as_many_pieces_as_there_are_and_no_more_than_it_may(total: int, seed: bytes, version: int) -> None:
    pool = select_pool(total, seed=seed, hotkey="m", version=version)
    assert len(pool) == len(set(pool)) == min(total, POOL)
    assert all(0 <= piece < total for piece in pool)
    assert list(pool) == sorted(pool)


def test_a_pool_is_another_for_every_seed_miner_and_window_and_reaches_everywhere() -> None:
    total = 10 * POOL

    def pool(seed: bytes = b"s", hotkey: str = "m", version: int = 0) -> tuple[int, ...]:
        return select_pool(total, seed=seed, hotkey=hotkey, version=version)

    assert len({pool(), pool(b"t"), pool(hotkey="n"), pool(version=1)}) == 4
    counts = Counter(piece for version in range(1000) for piece in pool(version=version))
    assert counts.keys() == set(range(total))
    assert all(count == pytest.approx(100, abs=60) for count in counts.values())


@given(
    st.integers(0, 10_000),
    st.floats(1e-3, 1),
    st.floats(0, 1),
    st.floats(1, 6),
    st.integers(0, 5),
)
def test_a_budget_is_the_stakes_part_and_never_nothing(
    units: int, share: float, stake: float, risk: float, least: int
) -> None:
    count = budget(units, share=share, stake_share=stake, risk=risk, least=least)
    assert min(units, least) <= count <= units
    assert count >= min(units, units * share * stake * risk - 1e-6)
    assert count <= max(least, units * share * stake * risk + 1)


def test_budgets_of_all_validators_sum_to_the_share() -> None:
    assert budget(1000, share=0.03, stake_share=0.5) * 2 == 30
    assert budget(1000, share=0.03, stake_share=1.0, risk=2.0) == 60
    assert budget(10, share=0.03, stake_share=0.1) == 1


@given(st.integers(0, 40), st.lists(st.integers(0, 8), max_size=6))
def test_units_are_spread_over_windows(count: int, windows: list[int]) -> None:
    given_ = spread(count, windows)
    assert sum(given_) == min(count, sum(windows))
    assert all(got <= size for got, size in zip(given_, windows, strict=True))
    full = [got for got, size in zip(given_, windows, strict=True) if got < size]
    assert not full or max(given_, default=0) - min(full) <= 1


def test_a_window_with_a_merge_is_picked_besides() -> None:
    heads = [head(version, version // 8) for version in range(16)]
    heads[5] = replace(heads[5], merged=3)
    for seed in range(40):
        without = select_windows(heads[:5] + heads[6:], seed=bytes([seed]), hotkey="m", slot=0, count=2)
        chosen = select_windows(heads, seed=bytes([seed]), hotkey="m", slot=0, count=2)
        assert heads[5] in chosen
        assert len(chosen) in (2, 3)
        assert set(chosen) - {heads[5]} <= set(without)
        assert heads[5] not in select_windows(heads, seed=bytes([seed]), hotkey="m", slot=1, count=2)
