"""The step that closes a picked window: what is fetched for it, and what comes of it on the bench.

Three looks. The arithmetic (`subnet.trust.step`) needs a piece of weights and moments, so whoever reads a window looks
at it so, and what does not follow is a proof. The gradient needs all backward units of the window, so a share of the
windows is looked at so, and what differs is a measurement: one test per window, whatever the pieces. Where Muon moves
matrices, whoever reads a window looks at one of them (`subnet.trust.polar`), which is a measurement too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from model.data import Corpus
from model.engine import replay_gradient
from model.layout import Layout
from model.optimizer import OptimizerConfig
from model.stage import Stage, assign_flat
from neurons.bench import Unit
from neurons.fetching import NamedState, Source
from subnet.swarm.merge import taken_over
from subnet.trust.finding import Check, Finding, Grade
from subnet.trust.heads import WindowHead
from subnet.trust.polar import Look, Moved, polar_error
from subnet.trust.step import Stretch, Values, entered, gradient_error, spans_of, step_error
from subnet.trust.tree import PIECE_VALUES

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
    layout = Layout.of(stage, config.kind)
    span, later = spans_of(piece, layout)
    weights, moments, after, moved = _states(head, layout)
    wanted = [(weights, span), (moments, span), (moments, later), (after, span), (moved, span), (moved, later)]
    values = await source.values(head.version, wanted)
    return Shown(piece, Stretch.of(stage, span, config), Values(*values[:3]), Values(*values[3:]))


async def moved(
    source: Source, before: WindowHead, head: WindowHead, piece: int, *, start: torch.Tensor, target: torch.Tensor
) -> bool:
    """Whether a window begins with what its replica's weights became when the state that they started from, `start`,
    became `target` (fp32 (n,) each), in one piece. `before` is the window before. Raises `Withheld`."""
    count = target.numel()
    span = range(piece * PIECE_VALUES, min((piece + 1) * PIECE_VALUES, count))
    named = [
        NamedState("previous_weights", before.next_weights, count),
        NamedState("weights", head.weights, count),
    ]
    held, begun = await source.values(head.version, [(state, span) for state in named])
    part = slice(span.start, span.stop)
    return torch.equal(begun, taken_over(held, start[part], target[part]))


async def show_matrix(source: Source, head: WindowHead, look: Look, *, layout: Layout) -> Moved:
    """The momentum of a matrix and a piece of its weights on both sides of a window's step. Raises `Withheld`."""
    weights, moments, after, moved = _states(head, layout)
    whole = look.place.span
    wanted = [(weights, look.span), (after, look.span), (moments, whole), (moved, whole)]
    return Moved(*await source.values(head.version, wanted))


def _states(head: WindowHead, layout: Layout) -> tuple[NamedState, NamedState, NamedState, NamedState]:
    """Weights and moments before a window's step, then after it."""
    return (
        NamedState("weights", head.weights, layout.values),
        NamedState("optimizer", head.optimizer, layout.moments),
        NamedState("next_weights", head.next_weights, layout.values),
        NamedState("next_optimizer", head.next_optimizer, layout.moments),
    )


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
    """The largest accepted error of a gradient, and of a matrix' change."""

    def arithmetic(self, head: WindowHead, shown: Sequence[Shown]) -> list[Finding]:
        """One proof per piece that is shown and has values with second moments."""
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
            if bool(one.stretch.adaptive.any())
        ]

    def polar(self, head: WindowHead, moved: Moved, look: Look) -> Finding:
        """Of one of Muon's matrices."""
        error = polar_error(moved, look, config=self.config, plan=self.stage.plan, steps=head.steps)
        return self._finding(
            head,
            Check.POLAR,
            Grade.MEASUREMENT,
            error=error,
            tolerance=self.tolerance,
            piece=look.piece,
            what=f"{look.place.name} did not move by the polar factor of its momentum",
        )

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
