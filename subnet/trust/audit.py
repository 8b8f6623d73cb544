"""The window audit: a slot's public seed picks windows, each validator's secret picks units inside, and replays them.

Everything here is a pure function. A slot's seed is the hash of a block that nobody knew while the slot's heads were
acknowledged; the secret is committed on chain before the round and revealed after it. So a miner knows neither window
nor unit while it computes, and who reads a validator's report can tell that it did not choose either. Of a picked
window's states the seed names a pool of pieces, from which the secret draws: the miner need not keep the others. The
validator puts the window's weights into the stage, replays forward (x to y) and backward (x, g to dx), and compares
*increments per token*: what the unit added to what was carried in, or its output where nothing is. A flat cosine of
0.9 would admit noise of 48 % of the signal and, because a residual stream changes little per block, a skipped layer
(facts: sota §5.1).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from model.engine import replay_backward, replay_forward, replay_tail
from model.split import StagePlan
from model.stage import Stage
from subnet.messages import WIRE_LIMIT
from subnet.trust.finding import Check, Finding, Grade
from subnet.trust.heads import WindowHead
from subnet.trust.ledger import Direction, Evidence, Leaf

POOL = 64
"""Pieces of a picked window's weights, and of what belongs to them, that its seed leaves to be looked at."""
KEPT_BACK = 0.01
"""A result that comes so near to the wire's limit may have been beyond it on another device."""

Tolerance = Callable[[Check], float]
"""The largest accepted error of a check, for one pair of devices."""


def _draw(seed: bytes, *parts: str) -> bytes:
    return hashlib.sha256(b"/".join((b"orion/audit/1", seed, *(part.encode() for part in parts)))).digest()


def _private(secret: bytes, seed: bytes) -> bytes:
    """A seed that nobody knows before both the secret is revealed and the public seed is there."""
    return hashlib.sha256(b"orion/private/1" + hashlib.sha256(secret).digest() + seed).digest()


def _share(draw: bytes) -> float:
    """In [0, 1)."""
    return int.from_bytes(draw[:8], "little") / 2**64


def select_windows(
    heads: Iterable[WindowHead], *, seed: bytes, hotkey: str, slot: int, count: float
) -> tuple[WindowHead, ...]:
    """`count` windows of `hotkey` in a slot by H(seed, hotkey, version); the same for the miner and all validators.

    One that a merge was taken over before is picked besides: there is one in a round, and its weights may be anything
    unless it is looked at.

    What `count` has beyond a whole number is the chance of one window more: short slots, whose windows need not be kept
    for long until their seed is known, need not all be looked into.
    """
    whole = math.floor(count)
    more = _share(_draw(seed, hotkey, "more", str(slot))) < count - whole
    inside = [head for head in heads if head.slot == slot]
    order = sorted(inside, key=lambda head: _draw(seed, hotkey, str(head.version)))
    return (*order[: whole + more], *(head for head in order[whole + more :] if head.merged))


def pick_windows(
    heads: Sequence[WindowHead], *, seeds: Iterable[bytes], hotkey: str, count: float
) -> list[tuple[WindowHead, bytes]]:
    """`count` windows of each slot with that slot's seed; `seeds` are by slot."""
    return [
        (head, seed)
        for slot, seed in enumerate(seeds)
        for head in select_windows(heads, seed=seed, hotkey=hotkey, slot=slot, count=count)
    ]


def reads_window(head: WindowHead, *, secret: bytes, seed: bytes, hotkey: str, share: float) -> bool:
    """Whether a validator fetches the weights of a picked window: so it does with `share` of them, by its secret."""
    return _share(_draw(_private(secret, seed), "window", hotkey, str(head.version))) < share


def comparable(plan: StagePlan, leaf: Leaf) -> bool:
    """Whether a unit's replay compares anything: the backward at the head sends nothing on. What it adds to the
    gradient is compared where a whole step is replayed."""
    return plan.is_last or not (plan.is_first and leaf.direction is Direction.BACKWARD)


def select_units(
    evidence: Evidence,
    head: WindowHead,
    *,
    secret: bytes,
    seed: bytes,
    hotkey: str,
    count: int,
    fits: Callable[[Leaf], bool] = lambda _: True,
) -> tuple[Leaf, ...]:
    """`count` of a window's units that `fits`, by H(secret, seed, hotkey, version, direction, sample).

    A larger count begins with the same units, so who goes on sampling replays none twice.
    """
    own = _private(secret, seed)

    def rank(leaf: Leaf) -> bytes:
        return _draw(own, hotkey, str(head.version), str(leaf.direction.value), str(leaf.sample))

    return tuple(sorted((leaf for leaf in evidence.window(head.version) if fits(leaf)), key=rank)[:count])


def replays_step(head: WindowHead, *, secret: bytes, seed: bytes, hotkey: str, share: float) -> bool:
    """Whether a validator replays the whole step of a picked window: so it does with `share` of them."""
    return _share(_draw(_private(secret, seed), "step", hotkey, str(head.version))) < share


def select_pool(total: int, *, seed: bytes, hotkey: str, version: int) -> tuple[int, ...]:
    """The pieces of a picked window's weights that may be looked at: `POOL` different numbers below `total`, ascending,
    by H(seed, hotkey, version); all where there are no more. The same for the miner and all validators."""
    if total <= POOL:
        return tuple(range(total))
    return _distinct(total, POOL, lambda turn: _draw(seed, hotkey, "pool", str(version), str(turn)))


def select_one(total: int, *, seed: bytes, hotkey: str, label: str, version: int) -> int:
    """One number below `total` for a picked window, by H(seed, hotkey, version): the same for everybody."""
    return int.from_bytes(_draw(seed, hotkey, label, str(version))[:8], "little") % total


def select_pieces(
    pool: Sequence[int], *, secret: bytes, seed: bytes, hotkey: str, label: str, count: int
) -> tuple[int, ...]:
    """`count` different pieces of a window's pool, ascending: which of them to look at."""
    own = _private(secret, seed)
    places = _distinct(len(pool), count, lambda turn: _draw(own, "piece", hotkey, label, str(turn)))
    return tuple(sorted(pool[place] for place in places))


def _distinct(total: int, count: int, draw: Callable[[int], bytes]) -> tuple[int, ...]:
    """`count` different numbers below `total`, or all of them, ascending; `draw` gives bytes for every turn."""
    found, turn = set[int](), 0
    while len(found) < min(count, total):
        found.add(int.from_bytes(draw(turn)[:8], "little") % total)
        turn += 1
    return tuple(sorted(found))


def budget(units: int, *, share: float, stake_share: float, risk: float = 1.0, least: int = 1) -> int:
    """How many of a miner's `units` of a round one validator replays.

    Its stake's part of the manifest's `share`, times the miner's risk factor, rounded up; at least `least` and at most
    all there are.
    """
    return min(units, max(least, math.ceil(units * share * stake_share * risk - 1e-9)))


def spread(count: int, windows: Sequence[int]) -> tuple[int, ...]:
    """`count` units over windows with so many each: as evenly as their sizes allow, the first ones first."""
    given = [0] * len(windows)
    for _ in range(min(count, sum(windows))):
        open_ = [place for place, size in enumerate(windows) if given[place] < size]
        given[min(open_, key=lambda place: given[place])] += 1
    return tuple(given)


@dataclass(frozen=True, slots=True)
class UnitTensors:
    """What a miner serves for one unit, as it crossed the wire: x (tokens at the head), g, and y or dx, which is not
    there where it is no finite number, or too large to be sent."""

    input: torch.Tensor
    gradient: torch.Tensor | None
    output: torch.Tensor | None


def straight(carried: torch.Tensor | None, output: torch.Tensor, *, carries: bool) -> torch.Tensor | None:
    """What of a unit's input goes on into its output: all, or nothing (head, tail, a form without such a path)."""
    return carried if carries and carried is not None and carried.shape == output.shape else None


def increment_error(
    claimed: torch.Tensor, replayed: torch.Tensor, carried: torch.Tensor | None, *, quantile: float = 0.99
) -> float:
    """Relative error per token of the increment (output minus carried-in), at a quantile over tokens.

    Shapes (B, T, b), fp32. Without a carried tensor (head, tail, form T) the output itself is the increment.
    Infinite where either is not finite.
    """
    increment = replayed - carried if carried is not None else replayed
    scale = increment.norm(dim=-1).clamp_min(1e-12)
    errors = ((claimed - replayed).norm(dim=-1) / scale).flatten()
    if not bool(torch.isfinite(errors).all()):
        return math.inf
    return float(torch.quantile(errors, quantile))


def replay(
    stage: Stage,
    leaf: Leaf,
    tensors: UnitTensors,
    *,
    tokens: torch.Tensor | None = None,
    targets: torch.Tensor | None,
    accumulation: int,
    tolerance: Tolerance,
    hotkey: str,
    number: int,
) -> tuple[Finding, ...]:
    """Compute one unit of `hotkey`'s round `number` again with the window's weights, which are in the stage, and
    compare: one finding for what it sent on, one for the loss it reported, none where there is nothing to compare.

    `tokens` are the sample's, for a stage that restores them, `targets` its next tokens, for the tail. The stage may be
    on any device.
    """

    def measured(check: Check, error: float, what: str) -> Finding:
        bound = tolerance(check)
        passed = error <= bound
        return Finding(
            hotkey=hotkey,
            round=number,
            stage=leaf.stage,
            check=check,
            grade=Grade.MEASUREMENT,
            passed=passed,
            error=error,
            tolerance=bound,
            version=leaf.version,
            sample=leaf.sample,
            reason="" if passed else f"{what}: {error:.3g} of {bound:g}",
        )

    found: list[Finding] = []
    there = stage.device
    x = tensors.input.to(there, None if stage.plan.is_first else torch.float32)
    tokens, targets = (None if ids is None else ids.to(there) for ids in (tokens, targets))
    carried: torch.Tensor | None
    computed: torch.Tensor | None
    if leaf.direction is Direction.FORWARD:
        check, computed = Check.FORWARD, replay_forward(stage, x, tokens)
        carried = None if stage.plan.is_first else x
    elif stage.plan.is_last:
        assert targets is not None  # noqa: S101 - whoever replays a tail has the corpus
        check, carried = Check.BACKWARD, None
        loss, computed = replay_tail(stage, x, targets, tokens, accumulation=accumulation)
        off = abs(loss - leaf.loss) / max(abs(loss), 1e-6)
        found.append(
            measured(Check.LOSS, off if math.isfinite(off) else math.inf, f"loss {leaf.loss:.5f}, replayed {loss:.5f}")
        )
    else:
        assert tensors.gradient is not None  # noqa: S101 - the shapes of what is fetched say so
        check, carried = Check.BACKWARD, tensors.gradient.to(there, torch.float32)
        computed = replay_backward(stage, x, carried, tokens)
    computed, carried = (None if one is None else one.cpu() for one in (computed, carried))
    if computed is not None and tensors.output is None:
        sendable = float(computed.abs().max()) < (1 - KEPT_BACK) * WIRE_LIMIT
        found.append(measured(check, math.inf if sendable else 0.0, "it sent nothing on, though it could: error"))
    elif computed is not None and tensors.output is not None:
        rounded = computed.to(tensors.output.dtype).to(torch.float32)
        carry = straight(carried, rounded, carries=stage.config.carries)
        error = increment_error(tensors.output.to(torch.float32), rounded, carry)
        found.append(measured(check, error, f"{check.value} increment is off"))
    return tuple(found)
