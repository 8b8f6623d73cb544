"""The step that closes a picked window: what is fetched for it, and what comes of it on the bench.

Two looks. The arithmetic (`subnet.trust.step`) needs a piece of weights and moments, so whoever reads a window looks at
it so, and what does not follow is a proof. The gradient needs all backward units of the window, so a share of the
windows is looked at so, and what differs is a measurement: one test per window, whatever the pieces.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from model.data import Corpus
from model.engine import replay_gradient
from model.optimizer import OptimizerConfig
from model.stage import Stage, assign_flat
from neurons.bench import Unit
from neurons.fetching import NamedState, Source
from subnet.swarm.merge import taken_over
from subnet.trust.finding import Check, Finding, Grade
from subnet.trust.heads import WindowHead
from subnet.trust.step import Stretch, Values, entered, gradient_error, spans_of, step_error

PIECES = 2
"""Looked at where the whole gradient is replayed, which costs far more than they do; else one is."""


@dataclass(frozen=True, slots=True)
class Shown:
    """One piece of the state around a step."""

    piece: int
    stretch: Stretch
    before: Values
    after: Values


async def show(source: Source, head: WindowHead, piece: int, *, stage: Stage, config: OptimizerConfig) -> Shown:
    """A piece of weights and moments on both sides of a window's step, in one call. Raises `Withheld`."""
    count = sum(parameter.numel() for parameter in stage.parameters())
    span, later = spans_of(piece, count)
    weights, moments = NamedState("weights", head.weights, count), NamedState("optimizer", head.optimizer, 2 * count)
    after, moved = (
        NamedState("next_weights", head.next_weights, count),
        NamedState("next_optimizer", head.next_optimizer, 2 * count),
    )
    wanted = [(weights, span), (moments, span), (moments, later), (after, span), (moved, span), (moved, later)]
    values = await source.values(head.version, wanted)
    return Shown(piece, Stretch.of(stage, span, config), Values(*values[:3]), Values(*values[3:]))


async def moved(
    source: Source, before: WindowHead, head: WindowHead, piece: int, *, start: torch.Tensor, target: torch.Tensor
) -> bool:
    """Whether a window begins with what its replica's weights became when the state that they started from, `start`,
    became `target` (fp32 (n,) each), in one piece. `before` is the window before. Raises `Withheld`."""
    count = target.numel()
    span, _ = spans_of(piece, count)
    named = [
        NamedState("previous_weights", before.next_weights, count),
        NamedState("weights", head.weights, count),
    ]
    held, begun = await source.values(head.version, [(state, span) for state in named])
    part = slice(span.start, span.stop)
    return torch.equal(begun, taken_over(held, start[part], target[part]))


@dataclass(frozen=True, slots=True)
class StepJudge:
    """What one miner's steps are judged by."""

    hotkey: str
    number: int
    """The round."""
    stage: Stage
    config: OptimizerConfig
    clip: float
    """The stage's bound on a gradient's norm."""
    accumulation: int
    tolerance: float
    """The largest accepted error of a gradient."""

    def arithmetic(self, head: WindowHead, shown: Sequence[Shown]) -> list[Finding]:
        """One proof per piece that is shown."""
        return [
            self._finding(
                head,
                Check.STEP,
                Grade.PROOF,
                error=step_error(
                    one.before,
                    one.after,
                    entered(one.before, one.after, config=self.config, plan=self.stage.plan),
                    one.stretch,
                    config=self.config,
                    plan=self.stage.plan,
                    steps=head.steps,
                ),
                tolerance=1.0,
                piece=one.piece,
                what="its step does not follow; in multiples of what rounding explains",
            )
            for one in shown
        ]

    def gradient(
        self, head: WindowHead, shown: Sequence[Shown], units: Sequence[Unit], theta: torch.Tensor, corpus: Corpus
    ) -> Finding:
        """Of a window with all its backward `units`. The stage has the window's weights `theta` (n,) then.

        A window that ends as it began says that its gradient was not finite, and must not have had a finite one.
        """
        assign_flat(self.stage, theta)
        replayed, norm = replay_gradient(
            self.stage,
            (self._unit(unit, corpus) for unit in units),
            accumulation=self.accumulation,
            clip=self.clip,
        )
        errors = [
            gradient_error(
                entered(one.before, one.after, config=self.config, plan=self.stage.plan),
                replayed[one.stretch.span.start : one.stretch.span.stop],
                one.stretch,
            )
            for one in shown
        ]
        finite, worst = math.isfinite(norm), max(range(len(shown)), key=errors.__getitem__, default=None)
        error, what = 0.0, "its gradient is not the one of its units"
        if finite and head.idle:
            error, what = 1.0, "it dropped a finite gradient"
        elif not finite and not head.idle:
            error, what = math.inf, "it stepped on a gradient that is not finite"
        elif worst is not None and finite:
            error = errors[worst]
        return self._finding(
            head,
            Check.GRADIENT,
            Grade.MEASUREMENT,
            error=error,
            tolerance=self.tolerance,
            piece=None if worst is None else shown[worst].piece,
            what=what,
        )

    def _unit(self, unit: Unit, corpus: Corpus) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        leaf, tensors = unit
        plan = self.stage.plan
        x = tensors.input if plan.is_first else tensors.input.to(torch.float32)
        sample = corpus.sample(leaf.sample)
        tokens = sample[:, :-1] if self.stage.restores else None
        if plan.is_last:
            return x, sample[:, 1:], tokens
        assert tensors.gradient is not None  # noqa: S101 - the shapes of what is fetched say so
        return x, tensors.gradient.to(torch.float32), tokens

    def _finding(
        self,
        head: WindowHead,
        check: Check,
        grade: Grade,
        *,
        error: float,
        tolerance: float,
        piece: int | None,
        what: str,
    ) -> Finding:
        passed = error <= tolerance
        return Finding(
            hotkey=self.hotkey,
            round=self.number,
            stage=self.stage.plan.index,
            check=check,
            grade=grade,
            passed=passed,
            error=error,
            tolerance=tolerance,
            version=head.version,
            piece=piece,
            reason="" if passed else f"{what}: {error:.3g} of {tolerance:g}",
        )
