"""Routing: which samples a head starts and which replica a microbatch visits at each stage, without asking anybody.

Sample ids follow from a head's index in the roster. The next hop is a lottery of *lanes*: samples go to a stage's `n`
replicas in turn, in an order drawn from H(seed, stage, index // lane). So any `n` samples in a row are on `n` replicas,
and where there are as many heads as replicas each head has a replica of its own for `lane` microbatches. Arrivals are
evenly spaced then. What is drawn anew for every microbatch arrives at random and queues up: at 100b with 3 replicas a
pipeline of the depth that hides its network reaches 65 % of the slowest stage's pace so, and 94 % with lanes of 64
and a half more in flight (docs/plan.md). Pathways still mix, from one order to the next, which attribution needs and
self-dealing fears.
"""

from __future__ import annotations

import hashlib
import math
from functools import lru_cache

LANE = 64
"""Microbatches of a head between two draws, as planned for long rounds: a draw costs some of what is in flight its even
spacing (2 % of the pace at 64, 3 to 5 at 32), and a round of half an hour has a dozen of them."""
IN_THE_WAY = 0.25
"""Part of a unit's time that a microbatch waits at a stage for one of the other direction: F·B/(F + B)², at most."""
SPREAD = 1.2
"""So many times more than exact times would need are kept in flight, for units whose times vary by a tenth."""
WAITING = 3
"""Units accepted and not computed, the one that runs included, with which a replica is full if pushes take no time and
there is one stage. Fewer would send away work that equal siblings find unequally busy by chance."""
SPARE = SPREAD * (1 + IN_THE_WAY) - 1
"""Units more for each stage: so many are in flight beyond those that compute (`depth`). They wait at the slowest stage,
and what is sent away from there leaves its lane, fills a sibling, and that sends away what is its own. By event
simulation, 100b in 16 stages of 3: 0.94 of the slowest stage's pace at the depth that heads keep and 0.97 a quarter
deeper; with a quarter of this 0.88 or 0.94, by chance, and 0.82. The price: if one of three is half as fast, its stage
reaches 0.86 to 0.87 of what it can, instead of 0.90."""


def sample_id(*, base: int, heads: int, head: int, index: int) -> int:
    """The `index`-th sample of head number `head` in a round whose first sample is `base`."""
    return base + index * heads + head


def head_of(sample: int, *, base: int, heads: int) -> int:
    """Number of the head that `sample` belongs to: the inverse of `sample_id`."""
    return (sample - base) % heads


def hops(
    replicas: tuple[str, ...], *, seed: bytes, stage: int, head: int, heads: int, index: int, lane: int
) -> tuple[str, ...]:
    """Replicas of `stage` for the `index`-th microbatch of head number `head` of `heads`: the planned one first, then
    where to go if it is down. None while the stage has no replica.

    Args:
        lane: microbatches of a head between two draws.
    """
    if not replicas:
        return ()
    order = _drawn(replicas, seed + f"/{stage}/{index // lane}/".encode())
    position = (index * heads + head) % len(replicas)
    return order[position:] + order[:position]


@lru_cache(maxsize=1 << 13)
def _drawn(replicas: tuple[str, ...], draw: bytes) -> tuple[str, ...]:
    """Remembered, because many microbatches follow one order."""
    return tuple(sorted(replicas, key=lambda hotkey: hashlib.sha256(draw + hotkey.encode()).digest()))


def heirs(replicas: tuple[str, ...], *, seed: bytes, sample: int) -> tuple[str, ...]:
    """In which order replicas of a stage take over a sample whose holder among them is gone: drawn per sample, so that
    a dead replica's work is spread, and known to all, so that as a rule only one takes it."""
    return _drawn(replicas, seed + f"/heir/{sample}/".encode())


def depth(*, stages: int, compute: float, latency: float, transfer: float, limit: int) -> int:
    """In-flight microbatches per head that hide the network: W = ceil(P + (P-1)(2L + x_f + x_b)/(F+B)) (facts: sota
    §2.2), with P + P/4 for P, because forwards and backwards are in each other's way, and a fifth more for times that
    vary: by the closed form alone stages would idle for a tenth to a sixth of their time (docs/plan.md).

    `compute` is F+B of one stage, `latency` L one way and `transfer` x_f + x_b, all in seconds.
    At least P, at most `limit` (what the input caches hold).
    """
    if compute <= 0:
        return min(stages, limit)
    wanted = (1 + IN_THE_WAY) * stages + (stages - 1) * (2 * latency + transfer) / compute
    return max(1, min(limit, math.ceil(SPREAD * wanted)))


def room(*, stages: int, unit_seconds: float, push_seconds: float, limit: int) -> int:
    """Units accepted and not computed with which a replica is full: what covers the time in which more can arrive.

    Args:
        stages: of the pipeline.
        unit_seconds: mean time of a unit, forward or backward; 0 before the first.
        push_seconds: mean time of a push. A refused sender's next offer has arrived after two.
        limit: what holds as long as nothing is measured.
    """
    if unit_seconds <= 0:
        return limit
    return WAITING + int(SPARE * stages) + math.ceil(2 * push_seconds / unit_seconds)
