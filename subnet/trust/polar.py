"""A Muon step, looked at on a piece of one matrix: whether its weights went where its momentum says.

First moments on both sides of a step, m and m', tell the gradient that entered, as they do for AdamW
(`subnet.trust.step`); with it the weights moved along the polar factor of

    g + μ(m' - g) = (1 + μ)·m' - μ·m

which is one of a whole matrix: no stretch of it can be checked from a stretch of the moments. So a picked window's seed
names one matrix, all of them alike likely, and one piece of the weights in it. Whoever reads the window fetches both
first moments of the matrix and the piece before and after, takes the polar factor in fp64 and compares.

It is a measurement: honest devices add up in other orders, and five iterations raise what rounding did to the smallest
singular values by up to 3.4445^5 = 485. A bound that no order of additions exceeds would grow with the length of a row
and say nothing at 100B. Measured by norm, over all 62 matrices of nano after 2, 20, 60 and 150 steps, against fp64:

    fp32, any order, 1 and 4 threads  5.1e-6 at most      exact factor, not five iterations  0.19 at least
    fp32 by TF32 products             0.0047 at most      four iterations, six               0.31 at least
    fp32 by bf16 products             0.035 at most       AdamW's step                       0.53 at least
    bf16                              0.087 at most

So `audit.tolerance` (0.02 in a local run) admits an fp32 stage with and without TF32; one in bf16 needs a wider one.

Bytes are what it costs. Of a matrix with N values 8·N are fetched: 2.4 GB for the largest of the 100b preset, 222 s at
a tenth of 856 Mbit/s, on average over its matrices 1.2 GB; and 6e13 FLOPs, as many as half a unit's forward. A row of
the factor alone takes 3,125 products of the matrix with a vector, 1 % of the arithmetic; products with random vectors
(Freivalds) check stated iterates. Both read the whole matrix, so neither spares what is short.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from model.layout import Layout, Place
from model.muon import polar, step_scale
from model.optimizer import OptimizerConfig, first_momentum, learning_rate, muon_share
from model.split import StagePlan
from subnet.trust.audit import select_one
from subnet.trust.step import ROUNDING, SLACK, SMALLEST
from subnet.trust.tree import PIECE_VALUES, pieces_in

DEVIATIONS = 4.0
"""Errors that have nothing to do with the weights add up along them to so many times what one of them is, at most."""


@dataclass(frozen=True, slots=True)
class Look:
    """What is looked at of one step."""

    place: Place
    """The matrix."""
    piece: int
    """Of the stage's flat weights."""

    @property
    def span(self) -> range:
        """The values of the matrix in the piece."""
        whole, start = self.place.span, self.piece * PIECE_VALUES
        return range(max(whole.start, start), min(whole.stop, start + PIECE_VALUES))


@dataclass(frozen=True, slots=True)
class Moved:
    """What is shown of it, fp32."""

    weights: torch.Tensor
    """In the look's span, (k,)."""
    next_weights: torch.Tensor
    first: torch.Tensor
    """First moments of the whole matrix, (m·n,)."""
    next_first: torch.Tensor


def look_pieces(place: Place) -> int:
    """The most pieces of a picked window's states that a look at this matrix adds: its momentum and one piece of the
    weights, before and after, and that piece before a merge."""
    return 2 * len(pieces_in(place.span)) + 3


def select_look(layout: Layout, *, seed: bytes, hotkey: str, version: int) -> Look | None:
    """The matrix and the piece of a picked window that its seed names; None where Muon moves no matrix."""
    if not layout.matrices:
        return None
    place = layout.matrices[select_one(len(layout.matrices), seed=seed, hotkey=hotkey, label="matrix", version=version)]
    pieces = pieces_in(place.span)
    return Look(place, pieces[select_one(len(pieces), seed=seed, hotkey=hotkey, label="look", version=version)])


def polar_error(moved: Moved, look: Look, *, config: OptimizerConfig, plan: StagePlan, steps: int) -> float:
    """How far the weights after optimizer step `steps` (from 0) are from what follows, beyond what rounding them
    explains: by norm over the look's span, and by what of it lies along the weights, as another decay does, each
    relative to a change that is spread evenly over its rows. Infinite where something is not finite."""
    place, beta = look.place, first_momentum(config, plan)
    lr = learning_rate(config, steps) * muon_share(place.name)
    old, new = (x.double().view(place.shape) for x in (moved.first, moved.next_first))
    change = lr * step_scale(place.shape) * polar((1 + beta) * new - beta * old)
    rows = change.square().mean(dim=1).sqrt()
    inside = torch.arange(look.span.start - place.start, look.span.stop - place.start)
    start, end = moved.weights.double(), moved.next_weights.double()
    off = end - (start * (1 - lr * config.weight_decay) - change.reshape(-1)[inside])
    rounding = SLACK * (ROUNDING * 2 * (start.abs() + end.abs()) + 2 * SMALLEST)
    beyond = off.sign() * (off.abs() - rounding).clamp_min(0)
    usual = float(rows[inside // place.shape[1]].norm())
    along = abs(float(beyond @ start)) / float(start.norm().clamp_min(SMALLEST)) * math.sqrt(len(start)) / DEVIATIONS
    error = max(float(beyond.norm()), along)
    if not math.isfinite(error) or not math.isfinite(usual):
        return math.inf
    return error / usual if usual else math.inf if error else 0.0
