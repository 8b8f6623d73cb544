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
    draw = seed + f"/{head}/{stage}/{block}/".encode()
    order = sorted(replicas, key=lambda hotkey: hashlib.sha256(draw + hotkey.encode()).digest())
    return tuple(order[position:] + order[:position])


def heirs(replicas: tuple[str, ...], *, seed: bytes, sample: int) -> tuple[str, ...]:
    """In which order replicas of a stage take over a sample whose holder among them is gone: drawn per sample, so that
    a dead replica's work is spread, and known to all, so that as a rule only one takes it."""
    draw = seed + f"/heir/{sample}/".encode()
    return tuple(sorted(replicas, key=lambda hotkey: hashlib.sha256(draw + hotkey.encode()).digest()))


def depth(*, stages: int, compute: float, latency: float, transfer: float, limit: int) -> int:
    """In-flight microbatches per head that hide the network: W = ceil(P + (P-1)(2L + x_f + x_b)/(F+B)).

    `compute` is F+B of one stage, `latency` L one way and `transfer` x_f + x_b, all in seconds (facts: sota §2.2).
    At least P, at most `limit` (what the input caches hold).
    """
    if compute <= 0:
        return min(stages, limit)
    wanted = stages + (stages - 1) * (2 * latency + transfer) / compute
    return max(1, min(limit, math.ceil(wanted)))
