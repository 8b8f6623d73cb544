"""Routing: which samples a head starts and which replica a microbatch visits at each stage, without asking anybody.

Sample ids follow from a head's index in the roster. The next hop is a *stratified* lottery: for every `n` consecutive
microbatches of a head, a stage's `n` replicas are visited once each, in an order drawn from H(seed, head, stage,
block). It mixes pathways as well as independent draws do, which attribution needs, and keeps the load of equal
replicas equal to within one microbatch, which independent draws do not (their spread grows with the square root of
the round's length).
"""

from __future__ import annotations

import hashlib
import math
from functools import lru_cache

WAITING = 3
"""Units accepted and not computed, the one that runs included, with which a replica is full if pushes take no time.
Fewer would send away work that equal siblings find unequally busy by chance; more needs more in flight."""


def sample_id(*, base: int, heads: int, head: int, index: int) -> int:
    """The `index`-th sample of head number `head` in a round whose first sample is `base`."""
    return base + index * heads + head


def head_of(sample: int, *, base: int, heads: int) -> int:
    """Number of the head that `sample` belongs to: the inverse of `sample_id`."""
    return (sample - base) % heads


def hops(replicas: tuple[str, ...], *, seed: bytes, head: str, stage: int, index: int) -> tuple[str, ...]:
    """Replicas of `stage` for a head's `index`-th microbatch: the planned one first, then where to go if it is down.

    None while the stage has no replica.
    """
    if not replicas:
        return ()
    block, position = divmod(index, len(replicas))
    order = _drawn(replicas, seed + f"/{head}/{stage}/{block}/".encode())
    return order[position:] + order[:position]


@lru_cache(maxsize=1 << 13)
def _drawn(replicas: tuple[str, ...], draw: bytes) -> tuple[str, ...]:
    """Remembered, because a head's microbatches visit one order after another."""
    return tuple(sorted(replicas, key=lambda hotkey: hashlib.sha256(draw + hotkey.encode()).digest()))


def heirs(replicas: tuple[str, ...], *, seed: bytes, sample: int) -> tuple[str, ...]:
    """In which order replicas of a stage take over a sample whose holder among them is gone: drawn per sample, so that
    a dead replica's work is spread, and known to all, so that as a rule only one takes it."""
    return _drawn(replicas, seed + f"/heir/{sample}/".encode())


def depth(*, stages: int, compute: float, latency: float, transfer: float, limit: int) -> int:
    """In-flight microbatches per head that hide the network: W = ceil(P + (P-1)(2L + x_f + x_b)/(F+B)).

    `compute` is F+B of one stage, `latency` L one way and `transfer` x_f + x_b, all in seconds (facts: sota §2.2).
    At least P, at most `limit` (what the input caches hold).
    """
    if compute <= 0:
        return min(stages, limit)
    wanted = stages + (stages - 1) * (2 * latency + transfer) / compute
    return max(1, min(limit, math.ceil(wanted)))


def room(*, unit_seconds: float, push_seconds: float, limit: int) -> int:
    """Units accepted and not computed with which a replica is full: what covers the time in which more can arrive.

    Args:
        unit_seconds: mean time of a unit, forward or backward; 0 before the first.
        push_seconds: mean time of a push. A refused sender's next offer has arrived after two.
        limit: what holds as long as nothing is measured.
    """
    return WAITING + math.ceil(2 * push_seconds / unit_seconds) if unit_seconds > 0 else limit
