"""One optimizer step, looked at on a stretch of a stage: whether it follows, and which gradient went into it.

The first moment after a step, m' = m + (1-β1)(g - m), tells the gradient g that entered. From g follows the second
moment, v' = β2·v + (1-β2)g², and from both the weights (AdamW: arXiv 1711.05101; NAdam: Dozat 2016, as torch computes
it). So who shows moments and weights on both sides of a step shows whether the step was the run's: its rate, its decay,
its betas, its number; what is left to check is the gradient, by replaying the window's units.

Everything is computed in fp64, and what is shown may differ from it by no more than fp32 rounding can explain, in any
order of operations, contracted to fused ones or not, subnormals kept or flushed: u = 2^-24 for each operation and each
constant that is rounded to fp32, to first order in u, and `SLACK` times that for the higher orders. So the bound holds
on every device that rounds sums, products, quotients and roots correctly, and a step outside it is not the run's:

    g     (u|m'| + 3u·|g-m|·min(1-β1, β1)) / (1-β1)                =: δ
    v'    u|v'| + 2u·β2·v + 3u(1-β2)g² + (1-β2)(2|g|δ + δ²)
    w'    2u|w| + 2u|w'| + Σ (10u + err c)·|c·d/denom| + c·δ/denom    d = m', for NAdam g too, of which alone is δ

What freedom that leaves is some 1e-6 of a weight and of a moment. A step with another number is told by its bias
corrections and warm-up, which all say the same once both are over: then it is also the same step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from model.layout import Layout
from model.optimizer import MOMENTUM_DECAY, OptimizerConfig, decay_of, first_momentum, learning_rate, takes_muon
from model.split import StagePlan
from model.stage import Stage
from subnet.trust.tree import PIECE_VALUES, pieces_in

ROUNDING = 2.0**-24
"""u: the largest relative error of one rounded fp32 operation."""
SMALLEST = 2.0**-126
"""The smallest normal fp32 number: what flushing a subnormal to zero may cost."""
SLACK = 2.0


def spans_of(piece: int, layout: Layout) -> tuple[range, range]:
    """Of a piece of a stage's flat weights: where its values and their first moments lie, each in its vector, and where
    the second moments do that they have, which may be none."""
    span = range(piece * PIECE_VALUES, min((piece + 1) * PIECE_VALUES, layout.values))
    return span, layout.second(span)


def moments_beside(pieces: Iterable[int], layout: Layout) -> tuple[int, ...]:
    """The pieces of the moments, ascending, that a step on these pieces of the weights takes."""
    spans = (span for piece in pieces for span in spans_of(piece, layout))
    return tuple(sorted({index for span in spans for index in pieces_in(span)}))


@dataclass(frozen=True, slots=True)
class Values:
    """A stretch of a replica's state, fp32 (k,) each."""

    weights: torch.Tensor
    first: torch.Tensor
    """Moments."""
    second: torch.Tensor
    """Of the values that have one."""


@dataclass(frozen=True, slots=True)
class Entered:
    """The gradient that a step took in, after clipping, fp64 (k,), and how far rounding may have moved it."""

    gradient: torch.Tensor
    uncertainty: torch.Tensor


@dataclass(frozen=True, slots=True)
class Stretch:
    """Which values of a stage are looked at, `span` in the order of `model.stage.flatten`, and what they belong to."""

    span: range
    decay: torch.Tensor
    """Weight decay, fp64 (k,)."""
    rows: torch.Tensor
    """int64 (k,): values of one row of a matrix, or of one vector, have the same number."""
    parameters: torch.Tensor
    """int64 (k,): so have values of one parameter."""
    adaptive: torch.Tensor
    """bool (k,): which values have second moments."""

    @classmethod
    def of(cls, stage: Stage, span: range, config: OptimizerConfig) -> Stretch:
        """Raises `IndexError` for a span that the stage does not have."""
        decays, rows, numbers, adaptive, start, count = [], [], [], [], 0, 0
        for number, (name, parameter) in enumerate(sorted(stage.named_parameters())):
            first, last = max(span.start - start, 0), min(span.stop - start, parameter.numel())
            inside = torch.arange(first, max(first, last))
            width = parameter.shape[-1]
            rows.append(count + inside // width)
            numbers.append(torch.full_like(inside, number))
            decays.append(torch.full(inside.shape, decay_of(config, parameter), dtype=torch.float64))
            adaptive.append(torch.full(inside.shape, not takes_muon(config.kind, name, parameter)))
            start += parameter.numel()
            count += parameter.numel() // width
        if not 0 <= span.start < span.stop <= start:
            raise IndexError(f"values {span.start} to {span.stop} of {start}: take some that there are")
        return cls(span, torch.cat(decays), torch.cat(rows), torch.cat(numbers), torch.cat(adaptive))


def entered(before: Values, after: Values, *, config: OptimizerConfig, plan: StagePlan) -> Entered:
    """The gradient that the first moments on both sides of a step imply."""
    beta = first_momentum(config, plan)
    share = 1 - beta
    old, new = before.first.double(), after.first.double()
    gradient = (new - beta * old) / share
    bound = ROUNDING * (new.abs() + 3 * min(share, beta) * (gradient - old).abs()) + 2 * SMALLEST
    return Entered(gradient, SLACK * bound / share)


def step_error(
    before: Values,
    after: Values,
    took: Entered,
    stretch: Stretch,
    *,
    config: OptimizerConfig,
    plan: StagePlan,
    steps: int,
) -> float:
    """How far second moments and weights after optimizer step `steps` (from 0) are from what follows, in multiples of
    what rounding explains: at most 1 for an honest step, infinite where something is not finite. Of values without
    second moments nothing is said: where they go depends on their whole matrix (`subnet.trust.polar`)."""
    here = stretch.adaptive
    g, delta = took.gradient[here], took.uncertainty[here]
    beta = config.betas[1]
    old, new = before.second.double(), after.second.double()
    expected = beta * old + (1 - beta) * g.square()
    bound = ROUNDING * (new.abs() + 2 * beta * old.abs() + 3 * (1 - beta) * g.square()) + 4 * SMALLEST
    bound = SLACK * bound + (1 - beta) * (2 * g.abs() + delta) * delta
    error = _worst(new - expected, bound)

    lr, number = learning_rate(config, steps), steps + 1
    start, end, moment = (x[here].double() for x in (before.weights, after.weights, after.first))
    correction = math.sqrt(1 - beta**number)
    denominator = new.sqrt() / correction + config.eps
    flushed = math.sqrt(SMALLEST) / correction / denominator
    if config.kind != "nadam":
        rates = [(moment, torch.zeros_like(moment), lr / (1 - config.betas[0] ** number), 0.0)]
    else:
        own, ahead = _nesterov(first_momentum(config, plan), number, lr)
        rates = [(g, delta, *own), (moment, torch.zeros_like(moment), *ahead)]
    expected = start * (1 - lr * stretch.decay[here])
    bound = ROUNDING * 2 * (start.abs() + end.abs())
    spread = torch.zeros_like(bound)
    for direction, unsure, rate, off in rates:
        change = rate * direction / denominator
        expected = expected - change
        bound = bound + (10 * ROUNDING + off + flushed) * change.abs() + SMALLEST * (1 + rate / denominator)
        spread = spread + rate * unsure / denominator
    return max(error, _worst(end - expected, SLACK * bound + spread))


def gradient_error(took: Entered, replayed: torch.Tensor, stretch: Stretch, *, quantile: float = 0.99) -> float:
    """How far the gradient that a step took in is from the replayed one (fp32 (k,), clipped): relative, at a quantile
    over the rows of matrices and the vectors of a stretch, and over each parameter's part of it as a whole.

    What rounding may have done to the former is taken off first. Where the replayed gradient is zero, like the rows of
    tokens that do not occur, so must the other be: an optimizer that divides by its second moment makes steps of full
    size out of any gradient, however small. Infinite where something is not finite.
    """
    true = replayed.double()
    off = ((took.gradient - true).abs() - took.uncertainty).clamp_min(0)
    if not bool(torch.isfinite(off).all()):
        return math.inf
    by_row = torch.quantile(_relative(off, true, stretch.rows), quantile, interpolation="higher")
    return max(float(by_row), float(_relative(off, true, stretch.parameters).max()))


def _relative(off: torch.Tensor, true: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """Norm of `off` by norm of `true` in each run of equal numbers of `groups`; 0 where nothing is off."""
    _, runs = torch.unique_consecutive(groups, return_inverse=True)

    def norms(values: torch.Tensor) -> torch.Tensor:
        return torch.zeros(int(runs[-1]) + 1, dtype=values.dtype).index_add_(0, runs, values.square()).sqrt()

    by = norms(off)
    return torch.where(by > 0, by / norms(true), torch.zeros_like(by))


def _nesterov(beta: float, number: int, lr: float) -> tuple[tuple[float, float], tuple[float, float]]:
    """NAdam's rates of step `number` (from 1) on the gradient and on the first moment, each with its relative error.

    torch keeps the product of all momenta so far in fp32, so it has two roundings per step.
    """
    product = 1.0
    for turn in range(1, number + 1):
        product *= _momentum(beta, turn)
        if product < SMALLEST:
            break
    momentum, ahead = _momentum(beta, number), _momentum(beta, number + 1)
    rounded = 2 * number * ROUNDING * product
    return (
        (lr * (1 - momentum) / (1 - product), rounded / (1 - product)),
        (lr * ahead / (1 - product * ahead), rounded * ahead / (1 - product * ahead)),
    )


def _momentum(beta: float, number: int) -> float:
    return float(beta * (1 - 0.5 * 0.96 ** (number * MOMENTUM_DECAY)))


def _worst(off: torch.Tensor, bound: torch.Tensor) -> float:
    """The largest of `off` in multiples of `bound`, (k,) each; infinite where one is not finite, 0 of none."""
    error = off.abs() / bound
    if not bool(torch.isfinite(error).all()):
        return math.inf
    return float(error.max()) if error.numel() else 0.0
