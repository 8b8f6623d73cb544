"""Yuma consensus: from what validators say to what miners and validators earn. One pure function, float64.

Follows subtensor's `run_epoch` with Yuma3 bonds. With stake S over permitted active validators (summing to 1)
and row-normalised weights W:

    C_j = max { w : sum_i S_i [W_ij >= w] >= kappa }        consensus, a stake-weighted median
    W'  = min(W, C)                                         what exceeds the consensus is clipped away
    T_i = sum_j W'_ij                                       validator trust
    R_j = sum_i S_i W'_ij,   I = R / sum R                  rank and incentive
    B   <- (1 - a) B + a ((1 - p) W + p W')                 bonds per edge, EMA with rate a, penalty p
    D_i ~ S_i sum_j (B_ij / sum_k B_kj) I_j                 dividends, normalised

Weights on oneself count only for the subnet's owner; weights on a neuron that registered at or after the
row's last update do not count, nor do bonds on one that registered since the last epoch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Subnet:
    """What an epoch starts from, for n neurons by uid.

    weights, bonds: (n, n), row i is validator i's. stake: (n,) in any unit. permits, active: (n,) bools.
    last_update, registered_at: (n,) blocks. kappa, bonds_rate (a) and bonds_penalty (p) in [0, 1]. owner is a
    uid or None.
    """

    weights: Matrix
    bonds: Matrix
    stake: Vector
    permits: NDArray[np.bool_]
    active: NDArray[np.bool_]
    last_update: NDArray[np.int64]
    registered_at: NDArray[np.int64]
    last_epoch: int
    owner: int | None
    kappa: float
    bonds_rate: float
    bonds_penalty: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an epoch decides, (n,) each except the (n, n) bonds.

    Incentive and dividends sum to 1 or are all 0.
    """

    consensus: Vector
    trust: Vector
    incentive: Vector
    dividends: Vector
    bonds: Matrix
    voting_stake: Vector


def epoch(subnet: Subnet) -> Outcome:
    """Run one epoch. Total stake or weights of zero give zeros, never NaN."""
    may_vote = subnet.permits & subnet.active
    stake = _normalise(np.where(may_vote, subnet.stake, 0.0))
    weights = _effective_weights(subnet)
    consensus = weighted_median(weights, stake, subnet.kappa)
    clipped = np.minimum(weights, consensus)
    incentive = _normalise(stake @ clipped)
    bonds = _next_bonds(subnet, weights, clipped)
    column = bonds.sum(axis=0)
    share = np.divide(bonds, column, out=np.zeros_like(bonds), where=column > 0)
    return Outcome(
        consensus=consensus,
        trust=clipped.sum(axis=1),
        incentive=incentive,
        dividends=_normalise(stake * (share @ incentive)),
        bonds=bonds,
        voting_stake=stake,
    )


def weighted_median(weights: Matrix, stake: Vector, kappa: float) -> Vector:
    """Per column, the largest weight that validators with at least `kappa` of the stake give or exceed.

    weights: (n, m) of non-negative numbers. stake: (n,), summing to 1 or 0. Returns (m,); 0 where no weight
    has that much stake behind it.
    """
    if not stake.any():
        return np.zeros(weights.shape[1])
    order = np.argsort(-weights, axis=0, kind="stable")
    behind = np.cumsum(stake[order], axis=0)
    # The epsilon keeps exact shares on their side: half of the stake must not fail by a rounding error.
    first = np.argmax(behind >= kappa - 1e-12, axis=0)
    median: Vector = np.take_along_axis(np.take_along_axis(weights, order, axis=0), first[None, :], axis=0)[0]
    return median


def top_validators(stake: Vector, count: int, owner: int | None) -> NDArray[np.bool_]:
    """Validator permits:

    the `count` neurons with most stake (none without any; lower uid first on a tie), and the owner.
    """
    permits = np.zeros(len(stake), dtype=np.bool_)
    permits[np.argsort(-stake, kind="stable")[:count]] = True
    permits &= stake > 0
    if owner is not None:
        permits[owner] = True
    return permits


def _effective_weights(subnet: Subnet) -> Matrix:
    weights = np.where(subnet.permits[:, None], subnet.weights, 0.0)
    diagonal = np.diagonal(weights).copy()
    np.fill_diagonal(weights, 0.0)
    if subnet.owner is not None:
        weights[subnet.owner, subnet.owner] = diagonal[subnet.owner]
    weights[subnet.last_update[:, None] <= subnet.registered_at[None, :]] = 0.0
    total = weights.sum(axis=1, keepdims=True)
    normalised: Matrix = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
    return normalised


def _next_bonds(subnet: Subnet, weights: Matrix, clipped: Matrix) -> Matrix:
    old = np.where(subnet.permits[:, None], subnet.bonds, 0.0)
    old[:, subnet.registered_at >= subnet.last_epoch] = 0.0
    target = (1 - subnet.bonds_penalty) * weights + subnet.bonds_penalty * clipped
    bonds: Matrix = (1 - subnet.bonds_rate) * old + subnet.bonds_rate * target
    return bonds


def _normalise(values: Vector) -> Vector:
    total = float(values.sum())
    scaled: Vector = values / total if total > 0 else np.zeros_like(values)
    return scaled
