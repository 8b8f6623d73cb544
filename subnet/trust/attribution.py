"""Attribution: whose pathways end in higher losses than others', with how much certainty (CLASP).

Given each microbatch's pathway and its loss, estimate every miner's effect on the loss, in nats, against the mean of
its stage. The idea is the IOTA primer's (arXiv 2507.17766), which publishes no formula; ours is a regression. Lotteries
mix the pathways (`subnet.swarm.routing`), so the estimate is not confounded; where they do not mix, as when two miners
share every pathway, it says so by a large error instead of a guess.

    loss = trend(time) + sum of the effects of the miners passed + noise

*Trend.* The loss falls as training goes on. It is taken out as Robinson's partially linear model does (Econometrica
56, 1988): the same local-linear smoother over sample order is subtracted from the losses and from each miner's 0/1
column, and residuals are regressed on residuals. A miner that was there for only a part of a round is compared with
those who were there with it. Losses are first cut at `CUT` robust deviations from the running median.

*Strata.* A tail can lie about the loss. Samples whose loss a validator has replayed make one stratum; what each tail
merely reports makes one of its own, with its own trend, weighted by how far that tail is trusted (`trust`). Within a
stratum a tail is compared with nobody but itself, so inflating everything gains it nothing, and the effect of the tails
themselves follows from replayed losses only. A tail that inflates the losses of a rival's pathways does move that
rival's estimate: `Effect.robust` is the least z found when any one tail's word is left out, and only that one counts.
So one lying tail frames nobody; two that collude raise an audit rate, by `RISK_LIMIT` at most.

*Regression.* Ridge with a normal prior of `PRIOR` nats, on the subspace where the effects of a stage sum to zero. The
error is the sandwich (White 1980) plus what the prior hides, so a direction the data say nothing of keeps the prior's
width. Two replicas with n microbatches each are told apart at z when n = 2 (z sigma / delta)^2.

It convicts nobody: a flag is an estimate's word, and what follows from it is `Effect.risk`, a factor on an audit rate.

Not seen: work that is wrong but harmless to the loss; a saboteur whose accomplice at the tail hides it (with that
tail's word its least z is low); all replicas of a stage doing alike.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from subnet.trust.settlement import Pathway

SPAN = 31
"""Samples of a stratum that a point of the trend is drawn through."""
CUT = 4.0
"""Robust standard deviations beyond which a loss counts as that far from the trend."""
PRIOR = 0.5
"""Nats: standard deviation of the prior on an effect. Far above any effect that audits leave open for long."""
LEAST_SAMPLES = 8
"""A stratum of a round with fewer samples than this tells a trend from nothing."""
LEAST_COUNT = 30.0
"""A miner with less weight of samples than this, on both sides of the comparison, is not judged."""
RISK_FROM = 2.0
"""The z from which an audit rate rises."""
RISK_LIMIT = 4.0
"""The largest factor on an audit rate."""
FAMILY_ERROR = 0.01
"""Probability that any honest miner of a clean swarm is flagged in one evaluation (Bonferroni over those judged)."""
LIES = 0.1
"""Share of lies in a tail's reports that `trust` guards against."""

Array = NDArray[np.float64]
Column = tuple[int, str]
"""(stage, hotkey): a miner that moves is another one at its new stage."""


def trust(passed: int, failed: int) -> float:
    """Weight of a tail's word, in [0, 1]: how surely it lies in less than a tenth of its reports, given how many of
    its recent losses were replayed, and agreed or not. Who was found out once has none."""
    return 0.0 if failed else 1.0 - (1.0 - LIES) ** passed


@dataclass(frozen=True, slots=True, kw_only=True)
class Effect:
    """One miner's part in the losses of its pathways, against the mean of its stage."""

    stage: int
    nats: float
    """Positive: its pathways end in higher losses."""
    error: float
    """Standard error, nats; near the prior's width where the data cannot tell."""
    robust: float
    """The least z when the word of any one tail is left out: what flag and risk are made from."""
    samples: float
    """Weight of the samples through it that can be compared with others', older rounds counting less."""
    flagged: bool
    """Whether `robust` is past the bound that holds for all miners judged together. Raises a rate, convicts nobody."""
    risk: float
    """Factor on its audit rate, in [1, RISK_LIMIT]: 1 up to `robust` = RISK_FROM, the limit where it is flagged."""

    @property
    def z(self) -> float:
        """Standard errors from zero."""
        return self.nats / self.error


@dataclass(slots=True)
class _Sums:
    """Sufficient statistics of one stratum: columns x (n, p) and losses y (n,), both without trend, weights w (n,)."""

    gram: Array = field(default_factory=lambda: np.zeros((0, 0)))
    """X' W X, (p, p)."""
    cross: Array = field(default_factory=lambda: np.zeros(0))
    """X' W y, (p,)."""
    meat: Array = field(default_factory=lambda: np.zeros((0, 0)))
    """X' W diag(y^2) W X, (p, p)."""
    squares: float = 0.0
    """Weighted sum of y^2."""
    weight: float = 0.0
    counts: Array = field(default_factory=lambda: np.zeros(0))
    """Weight of the samples through each column, where some of the stratum and round went another way, (p,)."""
    rivals: Array = field(default_factory=lambda: np.zeros(0))
    """Weight of those that went another way, (p,)."""

    def forget(self, factor: float) -> None:
        self.gram *= factor
        self.cross *= factor
        self.meat *= factor * factor
        self.squares *= factor
        self.weight *= factor
        self.counts *= factor
        self.rivals *= factor

    def add(self, other: _Sums) -> None:
        """Over the same columns."""
        self.gram = self.gram + other.gram
        self.cross = self.cross + other.cross
        self.meat = self.meat + other.meat
        self.squares += other.squares
        self.weight += other.weight
        self.counts = self.counts + other.counts
        self.rivals = self.rivals + other.rivals

    def arrange(self, places: Sequence[int | None]) -> _Sums:
        """The same with other columns: for each new one its place among the old, None for one that is new."""
        into = np.array([new for new, old in enumerate(places) if old is not None], dtype=np.intp)
        out = np.array([old for old in places if old is not None], dtype=np.intp)
        size = len(places)

        def square(old: Array) -> Array:
            new = np.zeros((size, size))
            new[np.ix_(into, into)] = old[np.ix_(out, out)]
            return new

        def line(old: Array) -> Array:
            new = np.zeros(size)
            new[into] = old[out]
            return new

        return _Sums(
            square(self.gram),
            line(self.cross),
            square(self.meat),
            self.squares,
            self.weight,
            line(self.counts),
            line(self.rivals),
        )


class Attribution:
    """Accumulates rounds. Memory: strata x columns^2 x 16 bytes; columns whose samples have faded are dropped, and a
    subnet has 256 hotkeys, so it does not grow with the length of the run."""

    def __init__(self, *, forgetting: float = 0.9) -> None:
        """
        Args:
            forgetting: what a round still weighs one round later, in (0, 1). Rounds worth are 1 / (1 - forgetting).
        """
        if not 0 < forgetting < 1:
            raise ValueError(f"forgetting is {forgetting}; it must lie between 0 and 1: 0.9 remembers ten rounds")
        self._forgetting = forgetting
        self._columns: list[Column] = []
        self._strata: dict[str | None, _Sums] = {}
        self._newest: int | None = None

    def add(
        self, number: int, pathways: Sequence[Pathway], *, audited: Mapping[int, float], trusted: Mapping[str, float]
    ) -> None:
        """Take in a round. Rounds come in order; one that is not newer than the last raises `ValueError`.

        Args:
            number: of the round.
            pathways: completed microbatches; sample ids rise in the order in which heads start them.
            audited: losses that validators have replayed, by sample, nats per token.
            trusted: weight in [0, 1] of what a tail merely reports, by hotkey (`trust`); 0 where it is not named.
        """
        if self._newest is not None:
            if number <= self._newest:
                raise ValueError(f"round {number} comes after round {self._newest}: add rounds in order, each once")
            for sums in self._strata.values():
                sums.forget(self._forgetting ** (number - self._newest))
        self._newest = number
        strata: dict[str | None, list[tuple[Pathway, float, float]]] = {}
        for path in sorted(pathways, key=lambda path: path.sample):
            tail = path.hotkeys[-1]
            if path.sample in audited:
                strata.setdefault(None, []).append((path, audited[path.sample], 1.0))
            elif trusted.get(tail, 0.0) > 0:
                strata.setdefault(tail, []).append((path, path.loss, trusted[tail]))
        strata = {key: rows for key, rows in strata.items() if len(rows) >= LEAST_SAMPLES}
        self._columns_for(strata)
        for key, rows in strata.items():
            sums = _sums(self._columns, rows)
            if key in self._strata:
                self._strata[key].add(sums)
            else:
                self._strata[key] = sums

    def estimate(self, *, without: Collection[str] = ()) -> dict[str, Effect]:
        """Effects by hotkey; of a miner that held several stages the most suspicious one.

        Args:
            without: tails whose word counts for nothing, such as those convicted.
        """
        tails = [key for key in self._strata if key is not None and key not in without]
        kept = [key for key in self._strata if key is None or key in tails]
        if not kept or not self._columns:
            return {}
        whole = self._solve(kept)
        least = whole.z
        for tail in tails:
            least = np.minimum(least, self._solve([key for key in kept if key != tail]).z)
        judged = np.minimum(whole.counts, whole.rivals) >= LEAST_COUNT
        bound = NormalDist().inv_cdf(1.0 - FAMILY_ERROR / max(1, int(judged.sum())))
        found: dict[str, Effect] = {}
        for place, (stage, hotkey) in enumerate(self._columns):
            robust = float(least[place]) if judged[place] else 0.0
            effect = Effect(
                stage=stage,
                nats=float(whole.effects[place]),
                error=float(whole.errors[place]),
                robust=robust,
                samples=float(whole.counts[place]),
                flagged=robust > bound,
                risk=_risk(robust, bound),
            )
            if hotkey not in found or found[hotkey].robust < effect.robust:
                found[hotkey] = effect
        return found

    def _columns_for(self, strata: Mapping[str | None, Sequence[tuple[Pathway, float, float]]]) -> None:
        """Make room for the miners of these rows; drop who has faded from all strata, and strata that have."""
        seen = {
            (stage, hotkey)
            for rows in strata.values()
            for path, _, _ in rows
            for stage, hotkey in enumerate(path.hotkeys)
        }
        counts = sum((sums.counts for sums in self._strata.values()), start=np.zeros(len(self._columns)))
        lasting = {column for column, count in zip(self._columns, counts, strict=True) if count >= 0.5}
        columns = sorted(seen | lasting)
        old = {column: place for place, column in enumerate(self._columns)}
        places = [old.get(column) for column in columns]
        self._strata = {key: sums.arrange(places) for key, sums in self._strata.items() if sums.weight >= 0.5}
        self._columns = columns

    def _solve(self, keys: Collection[str | None]) -> _Solution:
        sums = _Sums().arrange([None] * len(self._columns))
        for key in keys:
            sums.add(self._strata[key])
        if sums.weight == 0.0:
            none = np.zeros(len(self._columns))
            return _Solution(none, np.full(len(self._columns), PRIOR), none, none)
        variance = max(sums.squares / sums.weight, 1e-12)
        ridge = variance / PRIOR**2
        centre = _centring([stage for stage, _ in self._columns])
        # Adding the constant direction of each stage keeps the matrix invertible; the projections take it out again.
        normal = centre @ sums.gram @ centre + ridge * np.eye(len(centre)) + (np.eye(len(centre)) - centre)
        inverse = centre @ np.linalg.inv(normal) @ centre
        covariance = inverse @ (sums.meat + ridge**2 * PRIOR**2 * centre) @ inverse
        errors = np.sqrt(np.maximum(np.diag(covariance), 1e-18))
        return _Solution(inverse @ sums.cross, errors, sums.counts, sums.rivals)


@dataclass(frozen=True, slots=True)
class _Solution:
    effects: Array
    errors: Array
    counts: Array
    rivals: Array

    @property
    def z(self) -> Array:
        return self.effects / self.errors


def _risk(z: float, bound: float) -> float:
    return 1.0 + (RISK_LIMIT - 1.0) * min(1.0, max(0.0, (z - RISK_FROM) / (bound - RISK_FROM)))


def _centring(stages: Sequence[int]) -> Array:
    """The projection that subtracts the mean over each stage, (p, p)."""
    same = np.equal.outer(np.array(stages), np.array(stages)).astype(np.float64)
    centred: Array = np.eye(len(stages)) - same / same.sum(axis=1, keepdims=True)
    return centred


def _sums(columns: Sequence[Column], rows: Sequence[tuple[Pathway, float, float]]) -> _Sums:
    """Statistics of one stratum of one round. `rows` are (pathway, loss, weight) in sample order."""
    places = {column: place for place, column in enumerate(columns)}
    x = np.zeros((len(rows), len(columns)))
    for row, (path, _, _) in enumerate(rows):
        x[row, [places[stage, hotkey] for stage, hotkey in enumerate(path.hotkeys)]] = 1.0
    w = np.array([weight for _, _, weight in rows])
    losses = _cut(np.array([loss for _, loss, _ in rows]))
    flat, spent = _without_trend(np.column_stack([losses, x]))
    # A trend follows the noise a little: what is left of that is scaled up by the degrees of freedom it took.
    y, residual = flat[:, 0], flat[:, 1:]
    noise = y * math.sqrt(len(rows) / max(1.0, len(rows) - spent))
    weighted = residual * w[:, None]
    meat_rows = weighted * noise[:, None]
    through = w @ x
    counts = np.where(through < w.sum(), through, 0.0)
    return _Sums(
        gram=residual.T @ weighted,
        cross=weighted.T @ y,
        meat=meat_rows.T @ meat_rows,
        squares=float(w @ noise**2),
        weight=float(w.sum()),
        counts=counts,
        rivals=np.where(counts > 0, w.sum() - counts, 0.0),
    )


def _cut(losses: Array) -> Array:
    """Losses (n,) with those far from the running median brought back to `CUT` robust deviations from it."""
    span = min(SPAN, len(losses) - 1 + len(losses) % 2)
    ends = span // 2
    padded = np.concatenate([losses[ends:0:-1], losses, losses[-2 : -2 - ends : -1]])
    middle = np.median(np.lib.stride_tricks.sliding_window_view(padded, span), axis=1)
    spread = 1.4826 * float(np.median(np.abs(losses - middle)))
    return np.clip(losses, middle - CUT * spread, middle + CUT * spread)


def _without_trend(values: Array) -> tuple[Array, float]:
    """Columns (n, p) minus their local-linear smooth over `SPAN` rows, and the trace of the smoother."""
    n = len(values)
    half = min(SPAN, n) // 2
    rows = np.arange(n, dtype=np.float64)
    first, last = np.maximum(0, rows - half).astype(np.intp), np.minimum(n, rows + half + 1).astype(np.intp)

    def window(of: Array) -> Array:
        total = np.concatenate([np.zeros((1, *of.shape[1:])), np.cumsum(of, axis=0)])
        summed: Array = total[last] - total[first]
        return summed

    count = (last - first).astype(np.float64)
    place = window(rows)
    centre = place / count
    spread = window(rows**2) / count - centre**2
    mean = window(values) / count[:, None]
    slope = (window(values * rows[:, None]) / count[:, None] - mean * centre[:, None]) / spread[:, None]
    smooth = mean + slope * (rows - centre)[:, None]
    own = (1.0 + (rows - centre) ** 2 / spread) / count
    return values - smooth, float(own.sum())


def samples_needed(*, z: float, sigma: float, delta: float) -> float:
    """Microbatches per replica after which two replicas that differ by `delta` nats stand `z` errors apart, with
    losses of standard deviation `sigma` nats around their trend: n = 2 (z sigma / delta)^2."""
    return 2.0 * math.pow(z * sigma / delta, 2)
