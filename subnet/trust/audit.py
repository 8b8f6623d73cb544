"""The window audit: a public seed picks windows, each validator picks units inside, and replays them.

Everything here is a pure function. The seed is the hash of a block finalized after the evidence roots were fixed, so
a miner knows neither window nor unit while it computes. The validator puts the window's weights into the stage,
replays forward (x to y) and backward (x, g to dx), and compares *increments per token*: what the unit added to what
was carried in. A flat cosine of 0.9 would admit noise of 48 % of the signal and, because a residual stream changes
little per block, a skipped layer (facts: sota §5.1).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from model.engine import replay_backward, replay_forward, replay_tail
from model.stage import Stage
from subnet.trust.ledger import Direction, Evidence, Leaf, Window


def _draw(seed: bytes, *parts: str) -> bytes:
    return hashlib.sha256(b"/".join((b"orion/audit/1", seed, *(part.encode() for part in parts)))).digest()


def select_windows(evidence: Evidence, *, seed: bytes, hotkey: str, count: int) -> tuple[Window, ...]:
    """`count` windows of `hotkey`'s round by H(seed, hotkey, version); the same for every validator."""
    ranked = sorted(evidence.windows, key=lambda window: _draw(seed, hotkey, str(window.version)))
    return tuple(ranked[:count])


def select_units(
    evidence: Evidence, window: Window, *, seed: bytes, hotkey: str, validator: str, count: int
) -> tuple[Leaf, ...]:
    """`count` units computed with the window's weights: another draw for each validator, but one that the miner can
    repeat once the seed is out. What it computed is fixed by then; what it serves is not yet."""
    inside = [leaf for leaf in evidence.leaves if leaf.version == window.version]
    ranked = sorted(
        inside, key=lambda leaf: _draw(seed, hotkey, validator, str(leaf.direction.value), str(leaf.sample))
    )
    return tuple(ranked[:count])


@dataclass(frozen=True, slots=True)
class UnitTensors:
    """What a miner serves for one unit, as it crossed the wire: x (tokens at the head), g, and y or dx."""

    input: torch.Tensor
    gradient: torch.Tensor | None
    output: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Verdict:
    """The outcome of one replayed unit."""

    leaf: Leaf
    passed: bool
    error: float
    """99th percentile over tokens of the increment's relative error; 0 where there is nothing to compare."""
    reason: str


def increment_error(
    claimed: torch.Tensor, replayed: torch.Tensor, carried: torch.Tensor | None, *, quantile: float = 0.99
) -> float:
    """Relative error per token of the increment (output minus carried-in), at a quantile over tokens.

    Shapes (B, T, b), fp32. Without a carried tensor of that width (head, tail) the output itself is the increment.
    """
    increment = replayed - carried if carried is not None else replayed
    scale = increment.norm(dim=-1).clamp_min(1e-12)
    errors = (claimed - replayed).norm(dim=-1) / scale
    return float(torch.quantile(errors.flatten(), quantile))


def replay(
    stage: Stage, leaf: Leaf, tensors: UnitTensors, *, targets: torch.Tensor | None, accumulation: int, tolerance: float
) -> Verdict:
    """Compute one unit again with the window's weights and compare.

    `targets` are the sample's next tokens, for the tail. A claimed loss must agree within the same tolerance.
    """
    x = tensors.input if stage.plan.is_first else tensors.input.to(torch.float32)
    wire = torch.float32 if tensors.output is None else tensors.output.dtype
    computed: torch.Tensor | None
    if leaf.direction is Direction.FORWARD:
        computed = replay_forward(stage, x)
        carried = None if stage.plan.is_first else x
    elif targets is not None:
        loss, computed = replay_tail(stage, x, targets, accumulation=accumulation)
        if not abs(loss - leaf.loss) <= tolerance * max(abs(loss), 1e-6):
            return Verdict(leaf, False, abs(loss - leaf.loss), f"loss claimed {leaf.loss:.5f}, replayed {loss:.5f}")
        carried = None
    else:
        if tensors.gradient is None:
            return Verdict(leaf, False, float("inf"), "no gradient served for a backward unit")
        computed = replay_backward(stage, x, tensors.gradient.to(torch.float32))
        carried = tensors.gradient
    if computed is None or tensors.output is None:
        return Verdict(leaf, True, 0.0, "no boundary output to compare")
    rounded = computed.to(wire).to(torch.float32)
    carry = carried.to(torch.float32) if carried is not None and carried.shape == rounded.shape else None
    error = increment_error(tensors.output.to(torch.float32), rounded, carry)
    passed = error <= tolerance
    reason = "agrees" if passed else f"increment error {error:.3g} exceeds the tolerance {tolerance:g}"
    return Verdict(leaf, passed, error, reason)


def correctness(verdicts: Sequence[Verdict]) -> float:
    """1 if every replayed unit agreed, else 0. Nothing replayed is 1: a validator that saw nothing accuses nobody."""
    return 1.0 if all(verdict.passed for verdict in verdicts) else 0.0
