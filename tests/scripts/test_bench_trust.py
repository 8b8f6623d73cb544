"""The benches of trust: what they play is the validators' own code, and their arithmetic is right where it is known."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from scripts.bench.adversaries import PATTERNS, WITHHELD, cell, curves, outcomes, powers, targets
from scripts.bench.adversaries_text import Cell, draw, markdown
from scripts.bench.convictions import Honest, Noise, bound, clean_rounds, excursion, survival
from scripts.bench.detection import CHEATS, WEAK, Cheat, Errors, plays, power, roc
from scripts.bench.frontier import chance, setting
from scripts.bench.pointless import copier_dividends, holders_found, sybil_pay
from scripts.bench.sentencing import Book, Scale, Trial, drawn, finding, play
from subnet.trust.decision import HONEST_FAILURES
from subnet.trust.finding import Check, Finding
from subnet.trust.ledger import Direction, Leaf
from subnet.trust.tolerance import Device, Pair
from tests.adversaries.kinds import PROFILES, Kind

SCALE = Scale(microbatch_seconds=20.0, accumulation=8, slots=4, windows=1.0, readers=3.0, validators=3)
BOOK = Book.of(SCALE)
REPLAYED = Cheat(Kind.REPLAY, 0.0)


def checks(leaf: Leaf) -> Check:
    return Check.FORWARD if leaf.direction is Direction.FORWARD else Check.BACKWARD


def always(number: int, leaf: Leaf) -> tuple[Finding, ...]:
    return (finding(leaf, number, checks(leaf), error=1.0, tolerance=0.02),)


def never(number: int, leaf: Leaf) -> tuple[Finding, ...]:
    return (finding(leaf, number, checks(leaf), error=0.0, tolerance=0.02),)


def errors(value: float) -> list[Errors]:
    return [
        Errors(stage, way, {Check.FORWARD if way is Direction.FORWARD else Check.BACKWARD: value})
        for stage in range(4)
        for way in Direction
    ]


def one(cheat: Cheat, pattern: int, found: Sequence[Errors], *, trials: int = 4, rounds: int = 3) -> Cell:
    return cell(cheat, found, "dense", pattern=PATTERNS[pattern], budget=0.03, trials=trials, rounds=rounds, seed=1)


# -- rounds that are played -------------------------------------------------------------------------------------------


def test_who_always_cheats_is_convicted_in_its_first_round_and_weighs_nothing() -> None:
    fate = play(SCALE, BOOK, always, share=0.01, rounds=5, seed=0)
    assert fate.first == 0
    assert fate.pay == (0.0, 0.0)


def test_who_is_honest_is_replayed_within_the_budget_and_paid_like_others() -> None:
    rounds = 4
    fate = play(SCALE, BOOK, never, share=0.03, rounds=rounds, seed=0)
    assert fate.first is None
    assert fate.pay == (1.0,) * rounds
    each = math.ceil(BOOK.units * 0.03 / SCALE.validators)
    assert fate.replayed == rounds * SCALE.validators * each


def test_the_same_seed_gives_the_same_fate() -> None:
    assert one(REPLAYED, 2, errors(1.0)) == one(REPLAYED, 2, errors(1.0))


def test_what_no_replay_tells_from_honest_convicts_nobody() -> None:
    found = one(REPLAYED, 0, errors(0.001))
    assert (found.convicted_all, found.rounds_to_conviction, found.weight_after) == (0.0, None, None)
    assert found.pay_long == 1.0


def test_kinds_that_fail_alike_share_their_fate_and_others_do_not() -> None:
    gross, mild, mixed = errors(1.0), errors(0.03), [*errors(1.0), *errors(0.001)]
    assert outcomes(REPLAYED, gross) == outcomes(Cheat(Kind.COPYCAT, 0.0), errors(0.5))
    assert len({outcomes(REPLAYED, found) for found in (gross, mild, mixed, errors(0.001))}) == 4


def test_who_reads_few_windows_finds_less() -> None:
    alone = replace(SCALE, readers=0.01, windows=0.5)
    found = [play(alone, BOOK, always, share=0.03, rounds=1, seed=seed).first for seed in range(20)]
    assert None in found


def test_silence_is_convicted_by_each_validator_that_asked() -> None:
    assert one(WITHHELD, 0, ()).convicted_first_round == 1.0


def test_targets_say_how_many_met_them_and_who_was_worst() -> None:
    good, bad = one(REPLAYED, 0, errors(1.0)), one(Cheat(Kind.NOISE, 0.0), 0, errors(0.001))
    (target,) = targets([good, bad])
    assert (target.adversaries, target.met, target.worst, target.worst_share) == (2, 1, bad.kind, 0.0)


@pytest.mark.parametrize("readers", [1.0, 3.0])
@pytest.mark.parametrize("bad", [0.25, 0.5])
def test_the_frontiers_closed_form_agrees_with_what_is_played(readers: float, bad: float) -> None:
    """Windows of `SCALE` have 16 units, so nearly each has a falsified one."""
    scale, trials = replace(SCALE, windows=0.6, readers=readers), 150

    def some(seed: int, number: int, leaf: Leaf) -> tuple[Finding, ...]:
        fails = drawn(seed, number, leaf, 1000) < 1000 * bad
        return (finding(leaf, number, checks(leaf), error=float(fails), tolerance=0.02),)

    fates = [play(scale, BOOK, partial(some, seed), share=0.02, rounds=1, seed=seed) for seed in range(trials)]
    played = sum(fate.first == 0 for fate in fates)
    expected = chance(scale, units=BOOK.units, share=0.02, bad=bad)
    assert played / trials == pytest.approx(expected, abs=3 * (expected * (1 - expected) / trials) ** 0.5 + 0.02)


def test_no_setting_of_the_frontier_takes_more_flops_than_planned() -> None:
    poor, rich = setting(20, 0.1, 1.0, 0.3), setting(20, 0.3, 1.0, 0.1)
    assert all(2.9 < entry.flops_percent <= 3.0 for entry in (poor, rich))  # one step of the share below the limit
    assert poor.uplink_mbit < rich.uplink_mbit
    assert poor.both < rich.both
    assert all(entry.one < entry.both for entry in (poor, rich))


# -- what is measured -------------------------------------------------------------------------------------------------


def test_every_kind_that_changes_numbers_is_measured_somewhere() -> None:
    assert {cheat.kind for cheat in CHEATS} == {kind for kind, profile in PROFILES.items() if profile.falsifies}
    for cheat in (*CHEATS, *WEAK):
        ends = [(True, False), (False, False), (False, True)]
        assert any(plays(cheat.kind, is_first=first, is_last=last) for first, last in ends)
    assert len({cheat.name for cheat in (*CHEATS, *WEAK)}) == len(CHEATS) + len(WEAK)


def test_power_and_roc_count_what_exceeds() -> None:
    bad, good = errors(0.3), errors(0.01)
    assert power(bad, 0.02) == 1.0
    assert power(good, 0.02) == 0.0
    points = roc(bad, good)
    assert points[0][1:] == (0.0, 0.0)
    assert points[-1][1:] == (1.0, 1.0)
    assert (0.01, 0.0, 1.0) in points


def test_the_page_and_the_picture_name_every_kind(tmp_path: Path) -> None:
    measured = {cheat: errors(0.5) for cheat in CHEATS}
    noisy = errors(0.01)
    cells = [one(cheat, pattern, errors(0.5), trials=1, rounds=1) for cheat in CHEATS[:2] for pattern in range(3)]
    text = markdown(
        {"dense": SCALE},
        powers(measured, noisy),
        cells,
        list(targets(cells)),
        [setting(20, 0.1, 1.0, 0.3)],
        holders_found(validators=3, trials=10, seed=0),
        sybil_pay(rounds=2),
        copier_dividends(epochs=4, miners=4),
    )
    for kind in (*(cheat.kind for cheat in CHEATS), Kind.SYBIL, Kind.WEIGHT_COPIER, Kind.LYING_HOLDER):
        assert f"| {kind.value} |" in text
    assert "| dense | all | 3% | 100% | " in text
    assert "| 20 x 0.1 | 1 | 0.3 | " in text
    draw(tmp_path / "roc.png", curves(measured, noisy))
    assert (tmp_path / "roc.png").read_bytes().startswith(b"\x89PNG")


# -- who is not replayed ----------------------------------------------------------------------------------------------


def test_holders_are_found_as_often_as_rechecks_allow() -> None:
    found = holders_found(validators=3, trials=3000, seed=0)
    assert found["lying-holder"]["convicted_round"] == 1.0
    assert found["colluding-holders"]["convicted_round"] == pytest.approx(1 - (2 / 3) ** 3, abs=0.03)


def test_two_names_earn_what_one_machine_does_and_a_copier_never_more_than_an_auditor() -> None:
    assert sybil_pay(rounds=5)["pay"] == pytest.approx(1.0)
    ratios = copier_dividends(epochs=60, miners=12)
    assert all(ratio == pytest.approx(1.0, abs=1e-3) for ratio in ratios["static_scores"].values())
    late = list(ratios["one_conviction_per_epoch"].values())
    assert late == sorted(late, reverse=True)
    assert late[0] < 1.0


# -- the honest -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [0.0, 0.2])
def test_a_fitted_tail_is_read_back(shape: float) -> None:
    pair = Pair(
        devices=("cpu", Device.BF16.name.lower()),
        check=Check.FORWARD,
        tolerance=0.02,
        units=1000,
        p50=0.0,
        p99=0.0,
        largest=0.01,
        shape=shape,
        fit_q0=0.01,
        fit_gross=0.03,
    )
    assert survival(pair, 0.01) == pytest.approx(HONEST_FAILURES)
    assert survival(pair, 0.03) == pytest.approx(HONEST_FAILURES**2, rel=1e-6)
    assert survival(pair, 0.005) == HONEST_FAILURES
    assert HONEST_FAILURES**2 < survival(pair, 0.02) < HONEST_FAILURES


@pytest.mark.parametrize("correlation", [0.0, 0.3, 1.0])
def test_correlated_noise_fails_as_often_in_all(correlation: float) -> None:
    noise = Noise.of(fails=0.01, grossly=1e-4, correlation=correlation)
    assert noise.mild + noise.gross + noise.window == pytest.approx(0.01)


def test_importance_sampling_agrees_with_plain_counting() -> None:
    """Where convictions are frequent enough to be counted, tilted noise gives the same figure."""
    noise = Noise(mild=0.01, gross=0.004, window=0.05)
    plain, tilted = random.Random(1), random.Random(2)  # noqa: S311 - a simulation
    counted = [excursion(SCALE, BOOK, noise, [noise], share=0.03, chance=plain) for _ in range(500)]
    sampled = [excursion(SCALE, BOOK, noise, noise.tilted(), share=0.03, chance=tilted) for _ in range(500)]
    assert max(sampled) <= len(noise.tilted()) + 1e-9
    assert set(counted) <= {0.0, 1.0}
    assert 0.05 < sum(counted) / 500 < 0.6
    assert sum(sampled) / 500 == pytest.approx(sum(counted) / 500, rel=0.3)


def test_an_honest_unit_that_never_fails_is_never_convicted() -> None:
    found = bound("x", SCALE, BOOK, fails=0.0, grossly=0.0, correlation=0.5, excursions=5, share=0.03, seed=0)
    assert (found.per_year, found.convicting) == (0.0, 0)
    noise = Noise.of(fails=HONEST_FAILURES, grossly=HONEST_FAILURES**2, correlation=0.0)
    clean = clean_rounds(SCALE, BOOK, rounds=20, noise=noise, share=0.03, seed=0)
    assert clean["convictions"] == 0
    assert clean["units"] > 0


def test_a_likelihood_ratio_is_that_of_what_was_seen() -> None:
    noise, drawn = Noise(mild=0.1, gross=0.05, window=0.0), Noise(mild=0.3, gross=0.2, window=0.0)
    honest = Honest(noise, [drawn], random.Random(0))  # noqa: S311 - a simulation
    expected = 0.0
    for leaf in BOOK.windows[0].leaves:
        (found,) = honest.replay(0, leaf)
        if found.error > 0.1:
            expected += math.log(0.05 / 0.2)
        else:
            expected += math.log(0.95 / 0.8) + math.log(0.1 / 0.3 if found.error else 0.9 / 0.7)
    assert math.log(honest.ratio) == pytest.approx(expected)


def test_a_trial_without_conviction_has_no_first_round() -> None:
    assert Trial((False, False), (1.0, 1.0), 3).first is None
    assert Trial((False, True), (1.0, 0.0), 3).first == 1
