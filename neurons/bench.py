"""Where a validator computes: one stage at a time, in a thread, whoever asks.

Stages stay in host memory; whoever wants to compute waits for the bench, so no two are at work at once. Replays of one
window share its weights.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from model.accounting import stage_flops
from model.data import Corpus
from model.split import StagePlan
from model.stage import Stage, assign_flat
from subnet.manifest import Manifest
from subnet.transport.synapse import tensor_bytes
from subnet.trust.audit import Tolerance, UnitTensors, replay
from subnet.trust.finding import Finding
from subnet.trust.ledger import Direction, Leaf, digest

T = TypeVar("T")
Unit = tuple[Leaf, UnitTensors]


class Bench:
    """The stages of one validator, and the one thread that computes with them."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        self.stages = tuple(stages)
        self._free = asyncio.Lock()

    async def compute(self, work: Callable[[], T]) -> T:
        """Run `work`, which may use any one stage, when nobody else computes."""
        async with self._free:
            return await asyncio.to_thread(work)


def replay_units(
    stage: Stage,
    theta: torch.Tensor,
    units: Sequence[Unit],
    corpus: Corpus,
    *,
    accumulation: int,
    tolerance: Tolerance,
    hotkey: str,
    number: int,
) -> list[Finding]:
    """Findings on units of one window, see `subnet.trust.audit.replay`. The stage has the window's weights then."""
    assign_flat(stage, theta)
    found: list[Finding] = []
    for leaf, tensors in units:
        sample = corpus.sample(leaf.sample)
        found += replay(
            stage,
            leaf,
            tensors,
            tokens=sample[:, :-1] if stage.restores else None,
            targets=sample[:, 1:] if stage.plan.is_last else None,
            accumulation=accumulation,
            tolerance=tolerance,
            hotkey=hotkey,
            number=number,
        )
    return found


def other_data(leaves: Sequence[Leaf], corpus: Corpus) -> list[int]:
    """Samples that a head trained on other tokens than their own: those whose leaf has another input, ascending."""
    wrong = set()
    known: dict[int, bytes] = {}
    for leaf in leaves:
        if leaf.sample not in known:
            known[leaf.sample] = digest(tensor_bytes(corpus.sample(leaf.sample)[:, :-1]))
        if leaf.input != known[leaf.sample]:
            wrong.add(leaf.sample)
    return sorted(wrong)


def forward_flops(manifest: Manifest, plan: StagePlan) -> float:
    """FLOPs of one microbatch's forward at a stage; a backward has twice as many."""
    per_token = stage_flops(manifest.model.config(), plan, tokens=manifest.data.sequence)[0]
    return float(manifest.tokens_per_microbatch * per_token)


def replay_flops(leaf: Leaf, forward: float) -> float:
    """What the replay of a unit costs, given a forward's FLOPs: a backward computes the forward again."""
    return forward if leaf.direction is Direction.FORWARD else 3.0 * forward
