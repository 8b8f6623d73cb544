"""Yuma a second time, from the description of subtensor's `epoch_mechanism` and nothing else: slow, plain loops.

Shares no line, no array and no trick with `subnet.localchain.yuma`, so that the two can be held against each other.
Sums are exact (`math.fsum`); the consensus is the definition tried weight by weight, not a sort.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

Row = list[float]
Rows = list[Row]


@dataclass
class Given:
    """One epoch's input, by uid. Same meaning as `yuma.Subnet`, as lists."""

    weights: Rows
    bonds: Rows
    stake: Row
    permits: list[bool]
    active: list[bool]
    last_update: list[int]
    registered_at: list[int]
    oldest_commit: list[int] | None
    bonds_since: int
    owner: int | None
    kappa: float
    rate: float
    penalty: float
    liquid: tuple[float, float, float] | None
    yuma3: bool


@dataclass
class Result:
    """One epoch's output, by uid."""

    consensus: Row
    trust: Row
    incentive: Row
    dividends: Row
    emission: Row
    bonds: Rows
    voting: Row


def shares(values: Row) -> Row:
    total = math.fsum(values)
    return [value / total for value in values] if total > 0 else [0.0 for _ in values]


def column_shares(rows: Rows) -> Rows:
    columns = [shares([row[j] for row in rows]) for j in range(len(rows))]
    return [[columns[j][i] for j in range(len(rows))] for i in range(len(rows))]


def counted_weights(given: Given) -> Rows:
    """Steps 3: what of the weights counts, each row summing to 1 or nothing."""
    rows = []
    for i, row in enumerate(given.weights):
        kept = []
        for j, weight in enumerate(row):
            counts = given.permits[i]
            counts = counts and (i != j or i == given.owner)
            counts = counts and given.last_update[i] > given.registered_at[j]
            if given.oldest_commit is not None:
                counts = counts and given.oldest_commit[i] >= given.registered_at[j]
            kept.append(weight if counts else 0.0)
        rows.append(shares(kept))
    return rows


def majority_weight(column: Row, voting: Row, kappa: float) -> float:
    """The largest weight that has kappa of the stake at or above it."""
    best = 0.0
    for candidate in column:
        behind = math.fsum(voting[i] for i, weight in enumerate(column) if weight >= candidate)
        if behind >= kappa - 1e-12 and math.fsum(voting) > 0:
            best = max(best, candidate)
    return best


def rate_of_edge(given: Given, weight: float, bond: float, consensus: float) -> float:
    if given.liquid is None:
        return given.rate
    low, high, steepness = given.liquid
    apart = weight - consensus if weight >= bond else bond - weight
    apart = min(max(apart, 0.0), 1.0)
    return low + (high - low) / (1 + math.exp(-(steepness / 100) * (apart - 0.5)))


def epoch(given: Given) -> Result:
    n = len(given.stake)
    uids = range(n)
    stake = shares(given.stake)
    voting = shares([stake[i] if given.permits[i] and given.active[i] else 0.0 for i in uids])
    weights = counted_weights(given)
    consensus = [majority_weight([weights[i][j] for i in uids], voting, given.kappa) for j in uids]
    clipped = [[min(weights[i][j], consensus[j]) for j in uids] for i in uids]
    incentive = shares([math.fsum(voting[i] * clipped[i][j] for i in uids) for j in uids])
    target = [[(1 - given.penalty) * weights[i][j] + given.penalty * clipped[i][j] for j in uids] for i in uids]
    old = [[0.0 if given.registered_at[j] >= given.bonds_since else given.bonds[i][j] for j in uids] for i in uids]
    if given.yuma3:
        bonds = []
        for i in uids:
            bonds.append([])
            for j in uids:
                rate = given.rate
                if any(consensus):
                    rate = rate_of_edge(given, target[i][j], old[i][j], consensus[j])
                bonds[i].append((1 - rate) * old[i][j] + rate * target[i][j])
        owned = column_shares(bonds)
        dividends = shares([voting[i] * math.fsum(owned[i][j] * incentive[j] for j in uids) for i in uids])
    else:
        old = column_shares(old)
        delta = column_shares([[voting[i] * target[i][j] for j in uids] for i in uids])
        owned = [[(1 - given.rate) * old[i][j] + given.rate * delta[i][j] for j in uids] for i in uids]
        owned = column_shares(owned)
        dividends = shares([math.fsum(owned[i][j] * incentive[j] for j in uids) for i in uids])
        tops = [max(owned[i][j] for i in uids) for j in uids]
        bonds = [[owned[i][j] / tops[j] if tops[j] > 0 else 0.0 for j in uids] for i in uids]
    emission = shares([incentive[i] + dividends[i] for i in uids])
    if math.fsum(emission) == 0:
        emission = voting if math.fsum(voting) > 0 else stake
    trust = [math.fsum(row) for row in clipped]
    return Result(consensus, trust, incentive, dividends, emission, bonds, voting)
