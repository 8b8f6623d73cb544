"""The sequential test: when a miner's failed replays are no longer an accident.

A measurement has three outcomes. An honest replay fails with probability at most q0 (`subnet.trust.tolerance` sets the
tolerances so) and fails *grossly*, at several times the tolerance, with at most q0 squared. A cheater fails with f1,
half of it grossly. The likelihood ratio of a window's units is then

    S = mild * ln(f1/2 / q0) + gross * ln(f1/2 / q0^2) + passed * ln((1-f1) / (1-q0))

and the window counts as z = min(cap, ln(1 - p + p * exp(S))): a cheater may have packed its cheating into a share p of
its windows, so a clean window takes little back, and one window never convicts, because honest failures come together
(one bad driver makes a whole window wrong). Clipping a likelihood ratio is the minimax answer to such contamination
(Huber 1965, "A robust version of the probability ratio test"). With cap = 0.6 * bound two windows do convict: a miner
that cheats always is convicted in its first audited round, as a round has two slots or more.

The sum over windows is reflected at a floor (CUSUM; Page 1954), so that a long honest past cannot be spent later.
exp(z) has expectation at most 1 while a miner is honest, however long one goes on and why one stops; so by Ville's
inequality each of N windows begins an excursion to the bound with probability at most exp(-bound), and bound = ln(N /
false convictions per year) keeps the promise if units fail independently. What correlation costs beyond that is
measured: `scripts/bench/convictions.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

from subnet.trust.finding import Check, Finding, Grade

HONEST_FAILURES = 1e-4
"""q0: what share of an honest miner's replayed units may fail at most; tolerances are set by it."""
GROSS = 4.0
"""A failure beyond so many times the tolerance is gross."""
YEAR_SECONDS = 365.25 * 86_400
OPEN_ROUNDS = 2
"""The newest round and the one before it may still get findings: other validators' reports come late."""


class DecisionError(ValueError):
    """A rule that cannot decide: one line with the value and the limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """Constants of the test. Build it with `Rule.of`. Log-likelihoods are in nats."""

    fail_honest: float
    """q0, at most."""
    fail_cheat: float
    """f1: the share of failing units that the test is made for."""
    bound_convict: float
    rounds: int
    """Rounds that a conviction lasts, counted from the round it was found in."""
    floor: float = 0.0
    packed: float = 0.25
    """p: share of its windows that a cheater is taken to cheat in."""
    cap_share: float = 0.6
    """Share of the bound that one window can add."""
    gross: float = GROSS
    accept: float = 1.5
    """Below this one stops going on: after one mild failure some 55 units more were good, which a cheater of f1 = 0.05
    survives with 6 %. What is left still counts in later rounds."""
    newcomer: float = 3.0
    """Rate factor of who has no clean rounds yet, falling to 1 within `probation`."""
    probation: int = 12
    suspect: float = 3.0
    """Rate factor just below the bound."""
    anomaly: float = 2.0
    """The most that attribution and boundary statistics may raise a rate by."""
    most: float = 6.0
    """The largest rate factor of all."""

    @classmethod
    def of(
        cls,
        *,
        tests_per_year: float,
        false_convictions: float,
        rounds: int,
        q0: float = HONEST_FAILURES,
        f1: float = 0.05,
    ) -> Rule:
        """The rule that convicts an honest miner with at most `false_convictions` a year.

        tests_per_year: windows in which the miner is tested, in sum over validators (`tests_per_year`). rounds:
        `score.rounds` of the manifest. Raises `DecisionError` where no test is possible with such numbers.
        """
        if not 0 < q0 < f1 / 2 < 0.5:
            raise DecisionError(f"q0 is {q0} and f1 {f1}: 0 < q0 < f1 / 2 < 0.5 is needed, tighten the tolerances")
        if not 0 < false_convictions < 1 <= tests_per_year < math.inf or rounds < 1:
            raise DecisionError(
                f"{tests_per_year} tests a year, {false_convictions} false convictions, {rounds} rounds: at least 1 "
                "test, a share between 0 and 1, and at least 1 round are needed"
            )
        bound = math.log(tests_per_year / false_convictions)
        return cls(fail_honest=q0, fail_cheat=f1, bound_convict=bound, rounds=rounds)

    @property
    def cap(self) -> float:
        """The most that one window adds."""
        return self.cap_share * self.bound_convict

    def weight(self, *, mild: int, gross: int, passed: int) -> float:
        """z of a window with so many units of each outcome, in nats."""
        half = self.fail_cheat / 2
        s = mild * math.log(half / self.fail_honest) + gross * (math.log(half) - 2 * math.log(self.fail_honest))
        s += passed * math.log((1 - self.fail_cheat) / (1 - self.fail_honest))
        if s > 0:
            return min(self.cap, s + math.log(self.packed + (1 - self.packed) * math.exp(-s)))
        return math.log(1 - self.packed + self.packed * math.exp(s))

    def false_convictions(self, tests_per_year: float) -> float:
        """Bound on the probability that an honest miner, whose units fail independently, is convicted in a year."""
        return min(1.0, tests_per_year * math.exp(-self.bound_convict))


def tests_per_year(*, windows: float, round_seconds: float, validators: int) -> float:
    """Windows in which one miner is tested in a year: `windows` picked per round, by each of `validators`."""
    return windows * validators * YEAR_SECONDS / round_seconds


class Outcome(IntEnum):
    """What one unit's replay said; where it was said twice the worse holds."""

    PASSED = 0
    MILD = 1
    GROSS = 2


@dataclass(frozen=True, slots=True)
class TestedUnit:
    """One test in a window. A tail's loss and its gradient are one unit, so are all pieces of a window's gradient."""

    check: Check
    sample: int
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class TestedWindow:
    """What was measured in one window of one round."""

    round: int
    version: int
    units: tuple[TestedUnit, ...] = ()

    @property
    def failed(self) -> bool:
        return any(unit.outcome for unit in self.units)

    def weight(self, rule: Rule) -> float:
        outcomes = [unit.outcome for unit in self.units]
        mild, gross = outcomes.count(Outcome.MILD), outcomes.count(Outcome.GROSS)
        return rule.weight(mild=mild, gross=gross, passed=len(outcomes) - mild - gross)

    def having(self, unit: TestedUnit) -> TestedWindow:
        """The window with this test too; the worse outcome where it was tested before."""
        for index, known in enumerate(self.units):
            if (known.check, known.sample) == (unit.check, unit.sample):
                if known.outcome >= unit.outcome:
                    return self
                return replace(self, units=(*self.units[:index], unit, *self.units[index + 1 :]))
        return replace(self, units=(*self.units, unit))


@dataclass(frozen=True, slots=True)
class Suspicion:
    """What one validator holds against one miner. Immutable: `after` and `at` give the next one.

    Its fields are plain values, so pydantic's `TypeAdapter(Suspicion)` writes it to JSON and reads it back: a validator
    that restarts forgives nobody.
    """

    llr: float = 0.0
    """Of the windows that can get no more findings."""
    windows: tuple[TestedWindow, ...] = ()
    """The others, by round and version."""
    round: int = 0
    """The newest round that was heard of."""
    convicted_round: int | None = None
    """By proof or by the test: what a report may say."""
    withheld_round: int | None = None
    """By silence, which nobody else can check: counts in one's own score and never leaves the house."""
    clean: int = 0
    """Audited rounds without a failure since the last one with, since a conviction, or since the beginning."""

    @property
    def convicted(self) -> bool:
        """Whether its correctness is 0 in `round`."""
        return self.convicted_round is not None or self.withheld_round is not None

    def level(self, rule: Rule) -> float:
        """The test's value with all windows so far, in nats; `rule.bound_convict` convicts."""
        return _reflected(self.llr, self.windows, rule)

    def at(self, number: int, rule: Rule) -> Suspicion:
        """As round `number` begins: older windows are closed, and what has lasted `rule.rounds` is over.

        The end of a conviction is a clean slate with a newcomer's rates. Earlier rounds than `round` change nothing.
        """
        if number <= self.round:
            return self
        convicted = _lasting(self.convicted_round, number, rule)
        withheld = _lasting(self.withheld_round, number, rule)
        if self.convicted and convicted is None and withheld is None:
            return Suspicion(round=number)
        closed = [window for window in self.windows if window.round <= number - OPEN_ROUNDS]
        clean = self.clean
        for past in sorted({window.round for window in closed}):
            failed = any(window.failed for window in closed if window.round == past)
            clean = 0 if failed else clean + 1
        return Suspicion(
            llr=_reflected(self.llr, closed, rule),
            windows=self.windows[len(closed) :],
            round=number,
            convicted_round=convicted,
            withheld_round=withheld,
            clean=clean,
        )

    def after(self, finding: Finding, rule: Rule) -> Suspicion:
        """With one finding more: an own one, or another validator's that an own replay has reproduced.

        Each unit counts once, whoever replayed it. A failed proof convicts at once, so does silence in one's own score.
        Measurements of a round that is closed, or that has convicted already, say nothing new. Feed only measurements
        that compared something: a pass without a comparison would speak for the miner.
        """
        state = self.at(finding.round, rule)
        if finding.grade is Grade.MEASUREMENT:
            return state._measured(finding, rule)
        if finding.passed or finding.round + rule.rounds <= state.round:
            return state
        if finding.grade is Grade.PROOF:
            return replace(state, convicted_round=_newest(state.convicted_round, finding.round), clean=0)
        return replace(state, withheld_round=_newest(state.withheld_round, finding.round), clean=0)

    def unaudited(self, number: int) -> Suspicion:
        """As if nobody had looked in round `number`, unless something failed there: what passed before an audit broke
        off speaks for nobody."""
        if any(window.failed for window in self.windows if window.round == number):
            return self
        return replace(self, windows=tuple(window for window in self.windows if window.round != number))

    def after_all(self, findings: Iterable[Finding], rule: Rule) -> Suspicion:
        state = self
        for finding in findings:
            state = state.after(finding, rule)
        return state

    def goes_on(self, rule: Rule) -> bool:
        """Whether to replay more units now, in the picked windows of `round`: one failed there and it is undecided."""
        if self.convicted_round == self.round:
            return False
        failed = any(window.failed for window in self.windows if window.round == self.round)
        return failed and self.level(rule) > rule.accept

    def next_window(self, versions: Sequence[int]) -> int:
        """Of the picked windows of `round`, where to replay the next unit: the one with the fewest tests, then the
        first. A verdict takes two windows, so none is emptied before the others are looked into."""
        tested = {window.version: len(window.units) for window in self.windows if window.round == self.round}
        return min(versions, key=lambda version: tested.get(version, 0))

    def risk(self, rule: Rule, *, anomaly: float = 1.0) -> float:
        """Factor on the audit rate, from 1 to `rule.most`. No reputation lowers a rate below what the manifest says.

        anomaly: what attribution and boundary statistics say, 1 for nothing; it counts up to `rule.anomaly` and enters
        here only, so it convicts nobody.
        """
        newcomer = 1 + (rule.newcomer - 1) * max(0.0, 1 - self.clean / rule.probation)
        suspect = 1 + (rule.suspect - 1) * min(1.0, self.level(rule) / rule.bound_convict)
        strange = anomaly if math.isfinite(anomaly) else rule.anomaly
        return min(rule.most, newcomer * suspect * min(rule.anomaly, max(1.0, strange)))

    def _measured(self, finding: Finding, rule: Rule) -> Suspicion:
        decided = self.convicted_round is not None and finding.round <= self.convicted_round
        if decided or finding.round <= self.round - OPEN_ROUNDS:
            return self
        version = -1 if finding.version is None else finding.version
        key = (finding.round, version)
        windows = {(window.round, window.version): window for window in self.windows}
        windows[key] = windows.get(key, TestedWindow(*key)).having(_tested(finding, rule))
        state = replace(self, windows=tuple(windows[place] for place in sorted(windows)))
        if finding.passed or state.level(rule) < rule.bound_convict:
            return state
        return replace(state, llr=0.0, windows=(), convicted_round=finding.round, clean=0)


def portable(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """The failed findings that a report may carry: what was withheld cannot be shown, so it is not said."""
    return tuple(finding for finding in findings if not finding.passed and finding.grade is not Grade.WITHHELD)


def _tested(finding: Finding, rule: Rule) -> TestedUnit:
    check = Check.BACKWARD if finding.check is Check.LOSS else finding.check
    if finding.passed:
        outcome = Outcome.PASSED
    else:
        outcome = Outcome.MILD if finding.error <= rule.gross * finding.tolerance else Outcome.GROSS
    return TestedUnit(check, -1 if finding.sample is None else finding.sample, outcome)


def _reflected(level: float, windows: Iterable[TestedWindow], rule: Rule) -> float:
    for window in windows:
        level = max(rule.floor, level + window.weight(rule))
    return level


def _lasting(convicted: int | None, number: int, rule: Rule) -> int | None:
    return convicted if convicted is not None and number < convicted + rule.rounds else None


def _newest(known: int | None, number: int) -> int:
    return number if known is None else max(known, number)
