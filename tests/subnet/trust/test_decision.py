"""The sequential test: exact constants, clipped windows, a promise to the honest that holds for windows of any size."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from subnet.trust.decision import (
    OPEN_ROUNDS,
    YEAR_SECONDS,
    DecisionError,
    Outcome,
    Rule,
    Suspicion,
    portable,
)
from subnet.trust.decision import TestedUnit as Unit
from subnet.trust.decision import TestedWindow as Window
from subnet.trust.decision import tests_per_year as per_year
from subnet.trust.finding import Check, Finding, Grade

RULE = Rule.of(tests_per_year=1e5, false_convictions=1e-3, rounds=3)
TOLERANCE = 0.02
ERRORS = {Outcome.PASSED: 0.001, Outcome.MILD: 1.5 * TOLERANCE, Outcome.GROSS: 5 * TOLERANCE}
GOOD, MILD, GROSS = Outcome.PASSED, Outcome.MILD, Outcome.GROSS


def unit(
    outcome: Outcome,
    *,
    number: int = 5,
    version: int = 0,
    sample: int = 0,
    check: Check = Check.FORWARD,
) -> Finding:
    return Finding(
        hotkey="m",
        round=number,
        stage=1,
        check=check,
        grade=Grade.MEASUREMENT,
        passed=outcome is GOOD,
        error=ERRORS[outcome],
        tolerance=TOLERANCE,
        version=version,
        sample=sample,
    )


def units(*outcomes: Outcome, number: int = 5, version: int = 0) -> list[Finding]:
    return [unit(outcome, number=number, version=version, sample=sample) for sample, outcome in enumerate(outcomes)]


def failed(grade: Grade, *, number: int) -> Finding:
    return replace(unit(GROSS, number=number), check=Check.STEP, grade=grade)


# -- constants ----------------------------------------------------------------------------------------------------


def test_the_bound_is_what_a_year_of_tests_allows() -> None:
    assert RULE.bound_convict == pytest.approx(math.log(1e8), rel=1e-15)
    assert RULE.cap == pytest.approx(0.6 * math.log(1e8), rel=1e-15)
    assert RULE.false_convictions(1e5) == pytest.approx(1e-3, rel=1e-12)
    assert RULE.false_convictions(1e12) == 1.0


def test_tests_of_a_year_are_windows_of_all_validators() -> None:
    assert per_year(windows=2, round_seconds=3600, validators=4) == pytest.approx(2 * 4 * YEAR_SECONDS / 3600)


@pytest.mark.parametrize(
    "wrong",
    [
        {"q0": 0.0},
        {"q0": 0.05},
        {"f1": 1.0},
        {"tests_per_year": 0.5},
        {"tests_per_year": math.inf},
        {"false_convictions": 0.0},
        {"false_convictions": 1.0},
        {"rounds": 0},
    ],
    ids=str,
)
def test_a_test_that_cannot_decide_is_refused(wrong: dict[str, float]) -> None:
    right: dict[str, float] = {"tests_per_year": 1e5, "false_convictions": 1e-3, "rounds": 3}
    with pytest.raises(DecisionError):
        Rule.of(**(right | wrong))  # type: ignore[arg-type]


def test_weights_are_the_stated_likelihood_ratios() -> None:
    assert RULE.weight(mild=0, gross=0, passed=0) == pytest.approx(0.0, abs=1e-15)
    assert RULE.weight(mild=1, gross=0, passed=0) == pytest.approx(math.log(0.75 + 0.25 * 250), rel=1e-12)
    good = 0.95 / (1 - 1e-4)
    assert RULE.weight(mild=0, gross=0, passed=10) == pytest.approx(math.log(0.75 + 0.25 * good**10), rel=1e-12)
    roomy = replace(RULE, bound_convict=100.0)
    assert roomy.weight(mild=0, gross=1, passed=3) == pytest.approx(math.log(0.75 + 0.25 * 2.5e6 * good**3), rel=1e-12)


def test_windows_of_any_size_stay_finite() -> None:
    assert RULE.weight(mild=0, gross=10**6, passed=0) == RULE.cap
    assert RULE.weight(mild=0, gross=0, passed=10**6) == pytest.approx(math.log(0.75), rel=1e-12)


# -- one window, two windows --------------------------------------------------------------------------------------


def test_one_window_never_convicts_and_two_may() -> None:
    held = Suspicion().after_all(units(*[GROSS] * 200), RULE)
    assert not held.convicted
    assert held.level(RULE) == RULE.cap
    held = held.after_all(units(GROSS, version=1), RULE)
    assert held.convicted_round == 5


def test_two_failures_of_a_kind_in_two_windows_need_not_convict() -> None:
    held = Suspicion().after_all([*units(MILD), *units(MILD, version=1)], RULE)
    assert not held.convicted
    assert held.level(RULE) == pytest.approx(2 * math.log(63.25), rel=1e-12)


def test_a_long_honest_past_cannot_be_spent() -> None:
    held = Suspicion()
    for number in range(1000):
        held = held.after_all(units(*[GOOD] * 20, number=number), RULE)
    assert held.level(RULE) == RULE.floor
    spent = held.after_all(units(MILD, number=1000), RULE)
    assert spent.level(RULE) == pytest.approx(Suspicion().after_all(units(MILD), RULE).level(RULE), rel=1e-12)


def test_a_clean_window_takes_back_what_little_it_says() -> None:
    held = Suspicion().after_all([*units(GROSS), *units(*[GOOD] * 500, version=1)], RULE)
    assert held.level(RULE) == pytest.approx(RULE.weight(mild=0, gross=1, passed=0) + math.log(0.75), rel=1e-9)


def test_a_year_of_units_that_fail_as_rarely_as_they_may_and_apart_convicts_nobody() -> None:
    """One mild failure in 10,000 units is what the tolerances promise: it fades before the next one."""
    held = Suspicion()
    for number in range(2000):
        outcomes = [MILD if (number * 20 + place) % 10_000 == 0 else GOOD for place in range(20)]
        held = held.after_all(units(*outcomes, number=number), RULE)
        assert not held.convicted


# -- units --------------------------------------------------------------------------------------------------------


def test_order_inside_a_round_does_not_matter() -> None:
    findings = [*units(MILD, GOOD, GOOD), *units(GOOD, version=1), *units(GOOD, version=2)]
    levels = {Suspicion().after_all(order, RULE).level(RULE) for order in permutations(findings)}
    assert len(levels) == 1
    assert levels.pop() > 0


def test_a_unit_counts_once_however_often_it_is_replayed() -> None:
    once = Suspicion().after_all(units(MILD, GOOD), RULE)
    assert once.after_all(units(MILD, GOOD) * 50, RULE) == once


@pytest.mark.parametrize(("first", "second"), [(GOOD, GROSS), (GROSS, GOOD), (MILD, GROSS), (GROSS, MILD)], ids=str)
def test_of_two_replays_the_worse_holds(first: Outcome, second: Outcome) -> None:
    held = Suspicion().after_all([unit(first), unit(second)], RULE)
    assert held.level(RULE) == Suspicion().after(unit(GROSS), RULE).level(RULE)


def test_a_tail_s_loss_and_gradient_are_one_unit() -> None:
    both = Suspicion().after_all([unit(MILD, check=Check.LOSS), unit(MILD, check=Check.BACKWARD)], RULE)
    assert both.level(RULE) == Suspicion().after(unit(MILD), RULE).level(RULE)
    apart = Suspicion().after_all([unit(MILD, check=Check.FORWARD), unit(MILD, check=Check.BACKWARD)], RULE)
    assert apart.level(RULE) > both.level(RULE)


@pytest.mark.parametrize(
    ("error", "outcome"),
    [(4 * TOLERANCE, MILD), (4.001 * TOLERANCE, GROSS), (math.inf, GROSS), (math.nan, GROSS)],
    ids=str,
)
def test_what_is_gross_is_several_tolerances_off(error: float, outcome: Outcome) -> None:
    held = Suspicion().after(replace(unit(MILD), error=error), RULE)
    assert held.windows[0].units[0].outcome is outcome


# -- time ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grade", [Grade.PROOF, Grade.WITHHELD])
def test_a_conviction_lasts_its_rounds_and_ends_in_a_clean_slate(grade: Grade) -> None:
    held = Suspicion().after_all([*units(MILD, number=4), failed(grade, number=5)], RULE)
    for number in range(5, 5 + RULE.rounds):
        assert held.at(number, RULE).convicted
    assert held.at(5 + RULE.rounds, RULE) == Suspicion(round=5 + RULE.rounds)


def test_a_conviction_by_the_test_lasts_as_long_as_one_by_proof() -> None:
    held = Suspicion().after_all([*units(GROSS), *units(GROSS, version=1)], RULE)
    assert held.at(5 + RULE.rounds - 1, RULE).convicted
    assert not held.at(5 + RULE.rounds, RULE).convicted


def test_a_later_conviction_lasts_from_then_on() -> None:
    held = Suspicion().after_all([failed(Grade.PROOF, number=5), failed(Grade.PROOF, number=7)], RULE)
    assert held.convicted_round == 7
    assert held.after(failed(Grade.PROOF, number=6), RULE).convicted_round == 7


def test_what_comes_after_it_has_expired_says_nothing() -> None:
    held = Suspicion(round=10)
    assert held.after(failed(Grade.PROOF, number=10 - RULE.rounds), RULE) == held
    assert held.after_all(units(GROSS, number=10 - OPEN_ROUNDS), RULE) == held
    assert held.after_all(units(GROSS, number=10 - OPEN_ROUNDS + 1), RULE) != held


def test_what_has_convicted_is_not_counted_again() -> None:
    held = Suspicion().after_all([*units(GROSS), *units(GROSS, version=1)], RULE)
    assert held.after_all(units(GROSS, GROSS, version=2), RULE) == held
    assert held.after_all(units(GROSS, number=6), RULE).level(RULE) == RULE.cap


def test_closing_a_round_keeps_its_level() -> None:
    held = Suspicion().after_all([*units(MILD, GOOD), *units(MILD, version=1)], RULE)
    closed = held.at(5 + OPEN_ROUNDS, RULE)
    assert (held.windows, closed.windows) != ((), held.windows)
    assert closed.windows == ()
    assert closed.level(RULE) == held.level(RULE)
    assert closed.at(3, RULE) == closed


def test_silence_is_not_a_proof_and_stays_at_home() -> None:
    silent = Suspicion().after(failed(Grade.WITHHELD, number=5), RULE)
    assert silent.convicted
    assert silent.convicted_round is None
    proved = silent.after(failed(Grade.PROOF, number=5), RULE)
    assert (proved.convicted_round, proved.withheld_round) == (5, 5)
    told = [unit(GOOD), unit(MILD), failed(Grade.PROOF, number=5), failed(Grade.WITHHELD, number=5)]
    assert portable(told) == (told[1], told[2])


@pytest.mark.parametrize("grade", [Grade.PROOF, Grade.WITHHELD])
def test_what_passed_convicts_nobody(grade: Grade) -> None:
    assert not Suspicion().after(replace(failed(grade, number=5), passed=True), RULE).convicted


# -- what follows -------------------------------------------------------------------------------------------------


def test_more_is_replayed_only_where_it_is_open() -> None:
    assert not Suspicion().after_all(units(GOOD), RULE).goes_on(RULE)
    held = Suspicion().after_all(units(MILD), RULE)
    assert held.goes_on(RULE)
    assert not held.at(6, RULE).goes_on(RULE)
    assert not held.after_all([*units(GROSS), *units(GROSS, version=1)], RULE).goes_on(RULE)
    good = held.after_all(units(MILD, *[GOOD] * 60), RULE)
    assert not good.goes_on(RULE)
    assert good.level(RULE) > 0


def test_the_least_tested_window_is_next() -> None:
    held = Suspicion().after_all([*units(MILD, GOOD, version=3), *units(GOOD, version=7)], RULE)
    assert held.next_window([3, 7, 9]) == 9
    assert held.next_window([3, 7]) == 7


def test_risk_raises_a_rate_and_nothing_lowers_it() -> None:
    newcomer = Suspicion()
    assert newcomer.risk(RULE) == RULE.newcomer
    known = Suspicion(clean=RULE.probation)
    assert known.risk(RULE) == 1.0
    assert known.risk(RULE, anomaly=0.0) == 1.0
    assert known.risk(RULE, anomaly=1e9) == RULE.anomaly
    assert known.risk(RULE, anomaly=math.nan) == RULE.anomaly
    assert replace(known, llr=RULE.bound_convict).risk(RULE) == pytest.approx(RULE.suspect)
    assert replace(newcomer, llr=RULE.bound_convict).risk(RULE, anomaly=2.0) == RULE.most


def test_clean_rounds_count_until_one_fails() -> None:
    held = Suspicion()
    for number in range(5):
        held = held.after_all(units(GOOD, GOOD, number=number), RULE)
    assert held.at(5 + OPEN_ROUNDS, RULE).clean == 5
    dirty = held.after_all(units(MILD, GOOD, number=5), RULE)
    assert dirty.at(5 + OPEN_ROUNDS, RULE).clean == 0


def test_it_survives_being_written_down() -> None:
    adapter = TypeAdapter(Suspicion)
    held = Suspicion().after_all(
        [*units(MILD, GOOD), *units(GROSS, version=1, number=6), failed(Grade.WITHHELD, number=6)], RULE
    )
    back = adapter.validate_json(adapter.dump_json(held))
    assert back == held
    assert back.level(RULE) == held.level(RULE)
    assert isinstance(back.windows[0].units[0].outcome, Outcome)
    assert back.after_all(units(GROSS, number=6, version=2), RULE) == held.after_all(
        units(GROSS, number=6, version=2), RULE
    )


# -- properties ---------------------------------------------------------------------------------------------------

outcomes = st.sampled_from([GOOD, GOOD, GOOD, MILD, GROSS])
tables = st.lists(st.lists(outcomes, min_size=1, max_size=8), min_size=1, max_size=6)


def windows(table: list[list[Outcome]]) -> tuple[Window, ...]:
    return tuple(
        Window(5, version, tuple(Unit(Check.FORWARD, sample, out) for sample, out in enumerate(row)))
        for version, row in enumerate(table)
    )


@given(tables, st.data())
def test_a_worse_outcome_never_lowers_the_level(table: list[list[Outcome]], data: st.DataObject) -> None:
    row = data.draw(st.integers(0, len(table) - 1))
    place = data.draw(st.integers(0, len(table[row]) - 1))
    worse = [list(line) for line in table]
    worse[row][place] = data.draw(st.sampled_from([out for out in Outcome if out >= table[row][place]]))
    before, after = Suspicion(windows=windows(table)), Suspicion(windows=windows(worse))
    assert after.level(RULE) >= before.level(RULE)


@given(tables)
def test_the_level_is_never_below_the_floor_and_rises_by_the_cap_at_most(table: list[list[Outcome]]) -> None:
    level = 0.0
    for index in range(len(table)):
        now = Suspicion(windows=windows(table[: index + 1])).level(RULE)
        assert now >= RULE.floor
        assert now <= level + RULE.cap + 1e-12
        level = now


@given(
    size=st.integers(1, 60),
    q0=st.floats(1e-6, 0.02),
    f1=st.floats(0.05, 0.9),
    share=st.floats(0.0, 1.0),
    gross=st.floats(0.0, 1.0),
)
def test_an_honest_miner_wins_nothing_against_the_bank(
    size: int, q0: float, f1: float, share: float, gross: float
) -> None:
    """exp(z) of a window has expectation at most 1, exactly, for all honest units: those that fail with at most q0
    (here `share` of it), grossly with at most q0 squared. Ville's inequality needs no more."""
    rule = Rule.of(tests_per_year=1e5, false_convictions=1e-3, rounds=3, q0=q0, f1=f1)
    p_gross = gross * share * q0**2
    p_mild = share * q0 - p_gross
    total = 0.0
    for bad in range(size + 1):
        for grossly in range(bad + 1):
            ways = math.comb(size, bad) * math.comb(bad, grossly)
            chance = ways * p_mild ** (bad - grossly) * p_gross**grossly * (1 - p_mild - p_gross) ** (size - bad)
            total += chance * math.exp(rule.weight(mild=bad - grossly, gross=grossly, passed=size - bad))
    assert total <= 1 + 1e-12
