"""How often the honest are convicted: a bound per miner and year, and ten thousand rounds in which nobody is.

    python -m scripts.bench.convictions --out docs/benchmarks

Noise is that of two device classes, as calibrated (`subnet.trust.tolerance`): the chance that a unit's error exceeds
its pair's tolerance, and several times that, by the fitted tails. Beside them stands a class at its limit, which
fails with q0 and grossly with q0 squared. Failures of one device come together, so a share of them, the *correlation*,
is taken to come as whole windows in which every unit fails grossly; at 1 none comes alone.

A validator is taken to look into every picked window, because others' reports make it look at what failed there. All
else is what `orion plan` has as its defaults.

Convictions are too rare to wait for. A conviction ends an excursion of the test from its floor, which begins in some
round; so a year has at most as many as there are rounds and validators, times the probability that an excursion which
begins in a given round convicts. That is estimated by importance sampling: rounds are played over the validators' own
code, with failures made frequent, and each excursion counts with its likelihood ratio (Siegmund 1976).
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, stdev

from scripts.bench.report import report
from scripts.bench.sentencing import PLANNED, Bench, Book, Scale, audit, drawing, finding
from scripts.manifests import TOLERANCE
from subnet.trust.decision import GROSS, HONEST_FAILURES, YEAR_SECONDS, Suspicion
from subnet.trust.finding import Check, Finding
from subnet.trust.ledger import Direction, Leaf
from subnet.trust.scoring import History
from subnet.trust.tolerance import Calibration, Device, Pair, shipped

TARGET = 1e-3
CORRELATIONS = (0.0, 0.1, 0.25, 0.5, 1.0)
LONGEST = 40
"""Rounds of an excursion; longer ones count as convicting."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Noise:
    """Chances of an honest unit's outcomes when it fails alone, and of a window in which all fail grossly."""

    mild: float
    gross: float
    window: float

    @classmethod
    def of(cls, *, fails: float, grossly: float, correlation: float) -> Noise:
        """So that a unit fails with `fails` in all, of which `correlation` comes in whole windows."""
        return cls(
            mild=(1 - correlation) * (fails - grossly),
            gross=(1 - correlation) * grossly,
            window=correlation * fails,
        )

    def tilted(self) -> tuple[Noise, ...]:
        """Under which excursions are drawn, each as often: windows that go wrong made frequent, units that do, and
        neither, so that no likelihood ratio is above the number of these. What cannot happen is not made to."""
        windows = replace(self, window=max(self.window, 0.2) if self.window else 0.0)
        units = replace(
            self,
            mild=max(self.mild, 0.015) if self.mild else 0.0,
            gross=max(self.gross, 0.005) if self.gross else 0.0,
        )
        return self, windows, units


def survival(pair: Pair, error: float, *, q0: float = HONEST_FAILURES) -> float:
    """The chance that an honest unit's error exceeds `error`, by the pair's fitted tail; at most q0 from there on."""
    if pair.fit_gross <= pair.fit_q0:  # all errors are equal: nothing exceeds what is above them
        return 0.0 if error > pair.largest else q0
    if error <= pair.fit_q0:
        return q0
    beyond = (error - pair.fit_q0) / (pair.fit_gross - pair.fit_q0)
    if pair.shape < 1e-9:
        return math.pow(q0, 1 + beyond)
    heavy = 1 + beyond * (math.pow(q0, -pair.shape) - 1)
    return q0 * math.pow(heavy, -1 / pair.shape)


def worst(entry: Calibration, miner: Device, auditor: Device) -> tuple[float, float]:
    """The largest chances over checks to fail, and to fail grossly, at the pair's own tolerances."""
    pairs = [found for check in Check if (found := entry.find(miner, auditor, check)) is not None]
    return (
        max(survival(pair, pair.tolerance) for pair in pairs),
        max(survival(pair, GROSS * pair.tolerance) for pair in pairs),
    )


class Honest:
    """An honest miner's units: outcomes drawn from one of `mixture`, chosen by chance, and the likelihood ratio of
    `noise` to the mixture of all (the balance heuristic of Veach and Guibas 1995)."""

    def __init__(self, noise: Noise, mixture: Sequence[Noise], chance: random.Random) -> None:
        self._noises = (noise, *mixture)
        self._logs = [0.0] * len(self._noises)
        """Of the likelihoods of all that was looked at."""
        self._drawn, self._chance = chance.choice(mixture), chance
        self._bad: dict[tuple[int, int], bool] = {}

    @property
    def ratio(self) -> float:
        real, *others = self._logs
        return len(others) / sum(math.exp(other - real) for other in others)

    def replay(self, number: int, leaf: Leaf) -> tuple[Finding, ...]:
        key = (number, leaf.version)
        if key not in self._bad:
            self._bad[key] = self._toss(lambda noise: noise.window)
        if self._bad[key]:
            error = math.inf
        elif self._toss(lambda noise: noise.gross):
            error = 2 * GROSS * TOLERANCE
        else:
            error = 2 * TOLERANCE if self._toss(lambda noise: noise.mild) else 0.0
        check = Check.FORWARD if leaf.direction is Direction.FORWARD else Check.BACKWARD
        return (finding(leaf, number, check, error=error, tolerance=TOLERANCE),)

    def _toss(self, share: Callable[[Noise], float]) -> bool:
        fell = self._chance.random() < share(self._drawn)
        for index, noise in enumerate(self._noises):
            odds = share(noise) if fell else 1 - share(noise)
            self._logs[index] += math.log(odds) if odds > 0 else -math.inf
        return fell


def excursion(
    scale: Scale, book: Book, noise: Noise, mixture: Sequence[Noise], *, share: float, chance: random.Random
) -> float:
    """The likelihood ratio of one excursion that begins in round 0, if it convicts; else 0."""
    rule, honest = scale.rule, Honest(noise, mixture, chance)
    bench = Bench(Suspicion(clean=rule.probation), History(scale.score_rounds))
    for number in range(LONGEST):
        picked, secret = drawing(scale, book, chance)
        audit(bench, scale, book, rule, honest.replay, number, picked, secret, share)
        if bench.suspicion.convicted:
            return honest.ratio
        if bench.suspicion.level(rule) <= rule.floor:
            return 0.0
    return honest.ratio


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """Convictions of one honest miner in a year, by any validator."""

    noise: str
    correlation: float
    fails: float
    grossly: float
    per_year: float
    error: float
    """Of the estimate, 1.96 standard errors."""
    excursions: int
    convicting: int
    """How many of them did, under the tilted noise."""


def bound(
    name: str,
    scale: Scale,
    book: Book,
    *,
    fails: float,
    grossly: float,
    correlation: float,
    excursions: int,
    share: float,
    seed: int,
) -> Bound:
    noise = Noise.of(fails=fails, grossly=grossly, correlation=correlation)
    chance = random.Random(f"{seed}/{name}/{correlation}")  # noqa: S311 - a simulation
    found = [
        excursion(scale, book, noise, noise.tilted(), share=share, chance=chance) if fails else 0.0
        for _ in range(excursions)
    ]
    rounds = scale.validators * YEAR_SECONDS / scale.round_seconds
    return Bound(
        noise=name,
        correlation=correlation,
        fails=_brief(fails),
        grossly=_brief(grossly),
        per_year=_brief(rounds * mean(found)),
        error=_brief(1.96 * rounds * stdev(found) / math.sqrt(excursions)),
        excursions=excursions,
        convicting=sum(value > 0 for value in found),
    )


def clean_rounds(scale: Scale, book: Book, *, rounds: int, noise: Noise, share: float, seed: int) -> dict[str, int]:
    """Rounds of one honest miner, one after the other: how many convictions, failed units and units there were."""
    chance = random.Random(seed)  # noqa: S311 - a simulation
    rule, honest = scale.rule, Honest(noise, [noise], chance)
    benches = [Bench(Suspicion(clean=rule.probation), History(scale.score_rounds)) for _ in range(scale.validators)]
    convictions = failed = units = 0
    for number in range(rounds):
        slots = [drawing(scale, book, chance) for _ in benches]
        for bench, (_, secret) in zip(benches, slots, strict=True):
            before = bench.suspicion.convicted
            audit(bench, scale, book, rule, honest.replay, number, slots[0][0], secret, share)
            convictions += bench.suspicion.convicted and not before
            failed += len(bench.failed)
            units += bench.replayed
    return {"rounds": rounds, "units": units, "failed": failed, "convictions": convictions}


def _brief(value: float) -> float:
    return float(f"{value:.3g}")


def cases() -> Sequence[tuple[str, float, float]]:
    """Name, chance to fail, chance to fail grossly."""
    entry = next(entry for entry in shipped().calibration if entry.model == "nano")
    classes = [("cpu by cpu", Device.CPU), ("bf16 by cpu", Device.BF16)]
    measured = [(name, *worst(entry, device, Device.CPU)) for name, device in classes]
    return [*measured, ("at the limit", HONEST_FAILURES, HONEST_FAILURES**2)]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.bench.convictions", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/bench") / time.strftime("%Y%m%d-%H%M%S"))
    parser.add_argument("--quick", action="store_true", help="few excursions and rounds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", type=float, default=0.03, help="audit budget in sum over validators (default: 0.03)")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    excursions, rounds = (50, 200) if options.quick else (200, 10_000)
    scale = replace(PLANNED, readers=float(PLANNED.validators))
    book = Book.of(scale)
    bounds = [
        bound(
            name,
            scale,
            book,
            fails=fails,
            grossly=grossly,
            correlation=correlation,
            excursions=excursions,
            share=options.share,
            seed=options.seed,
        )
        for name, fails, grossly in cases()
        for correlation in CORRELATIONS
    ]
    limit = Noise.of(fails=HONEST_FAILURES, grossly=HONEST_FAILURES**2, correlation=0.0)
    clean = clean_rounds(scale, book, rounds=rounds, noise=limit, share=options.share, seed=options.seed)
    kept = [entry for entry in bounds if entry.per_year + entry.error <= TARGET]
    figures = {
        "seed": options.seed,
        "target_per_year": TARGET,
        "scale": asdict(scale) | {"bound": scale.rule.bound_convict, "cap": scale.rule.cap},
        "bounds": [asdict(entry) for entry in bounds],
        "measured_classes_within_target": all(entry in kept for entry in bounds if entry.noise != "at the limit"),
        "limit_within_target_up_to_correlation": max(
            (entry.correlation for entry in kept if entry.noise == "at the limit"), default=None
        ),
        "clean_rounds": clean,
    }
    report("convictions", options.out, figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
