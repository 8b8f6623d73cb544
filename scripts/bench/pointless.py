"""Adversaries that no replay of a unit meets: who lies about merged shards, who is two, who copies weights.

The first are found by rechecks, over the merge's own functions. The others cannot be convicted; what they earn is
computed with the scores' and the chain's own arithmetic.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from subnet.localchain.yuma import Subnet, epoch
from subnet.swarm.butterfly import Butterfly, Verdict, recheck
from subnet.trust.scoring import History, Score

REPLICAS = 3
TRUE, WRONG = b"true----", b"wrong---"


def holders_found(*, validators: int, trials: int, seed: int) -> dict[str, dict[str, float | str]]:
    """Share of merges with one lying holder, and with a colluding pair, in which somebody recomputes their shard."""
    chance = random.Random(seed)  # noqa: S311 - a simulation
    names = [f"replica-{index}" for index in range(REPLICAS)]
    found = dict.fromkeys(("lying-holder", "colluding-holders"), 0)
    for _ in range(trials):
        plan = Butterfly.draw(names, 1000, chance.randbytes(32))
        shard = chance.randrange(len(plan.pairs))
        pair = plan.holders(shard)
        for kind, liars in (("lying-holder", pair[:1]), ("colluding-holders", pair)):
            judged = [
                Verdict({who: WRONG if index == shard and who in liars else TRUE for who in holders}, len(holders))
                for index, holders in enumerate(plan.pairs)
            ]
            if judged[shard].contested:
                found[kind] += 1
                continue
            watchers = [*(f"validator-{index}" for index in range(validators))]
            found[kind] += any(recheck(plan, judged, who, chance.randbytes(32)) == shard for who in watchers)
    return {
        kind: {
            "convicted_round": count / trials,
            "moved": "nothing: contested shards carry over" if kind == "lying-holder" else "the shard, in that round",
            "where": "codecs int8 and bf16; with topk2bit nobody holds a shard",
        }
        for kind, count in found.items()
    }


def sybil_pay(*, rounds: int, parts: Sequence[float] = (0.5, 0.5)) -> dict[str, float]:
    """Pay of identities that share one GPU, each with its part of the units, over that of an honest miner with one."""
    history = History(3)
    names = [f"sybil-{index}" for index in range(len(parts))]
    for _ in range(rounds):
        entries = {name: Score(name, part, 1.0, 1.0, 1.0) for name, part in zip(names, parts, strict=True)}
        history.close(entries | {"honest": Score("honest", 1.0, 1.0, 1.0, 1.0)})
    shares = history.shares()
    return {"identities": len(parts), "pay": sum(shares[name] for name in names) / shares["honest"]}


def copier_dividends(*, epochs: int = 200, miners: int = 48, seed: int = 0) -> dict[str, dict[str, float]]:
    """Dividends of a validator that sets the mean of the others' weights of some epochs ago, over an honest one's with
    the same stake; where scores never move, and where each epoch one miner in 48 is convicted for three."""
    result = {}
    for name, convictions in (("static_scores", 0.0), ("one_conviction_per_epoch", 1.0)):
        result[name] = {
            f"lag_{lag}": _ratio(epochs, miners, lag, convictions, np.random.default_rng(seed)) for lag in (1, 2, 4)
        }
    return result


def _ratio(epochs: int, miners: int, lag: int, convictions: float, chance: np.random.Generator) -> float:
    validators, size = 4, 4 + miners
    past: list[NDArray[np.float64]] = []
    until = np.zeros(miners, dtype=np.int64)
    bonds = np.zeros((size, size))
    earned = np.zeros(size)
    for now in range(epochs):
        if chance.random() < convictions:
            until[chance.integers(miners)] = now + 3
        right = np.concatenate([np.zeros(validators), (until <= now).astype(np.float64)])
        right /= right.sum()
        past.append(right)
        weights = np.zeros((size, size))
        weights[: validators - 1] = right
        weights[validators - 1] = past[max(0, now - lag)]
        judge = np.arange(size) < validators
        outcome = epoch(
            Subnet(
                weights=weights,
                bonds=bonds,
                stake=judge.astype(np.float64),
                permits=judge,
                active=np.ones(size, dtype=np.bool_),
                last_update=np.full(size, now + 1),
                registered_at=np.zeros(size, dtype=np.int64),
                bonds_since=1,
                owner=None,
                kappa=0.5,
                bonds_rate=0.1,
                bonds_penalty=1.0,
            )
        )
        bonds = outcome.bonds
        earned += outcome.dividends
    return float(f"{earned[validators - 1] / earned[0]:.4g}")
