"""Yuma consensus: from what validators say to what miners and validators earn. One pure function, float64.

Follows subtensor's `run_epoch` (`epoch_mechanism`). With stake S over permitted active validators (summing to 1)
and row-normalised weights W:

    C_j = max { w : sum_i S_i [W_ij >= w] >= kappa }        consensus, a stake-weighted median
    W'  = min(W, C)                                         what exceeds the consensus is clipped away
    T_i = sum_j W'_ij                                       validator trust
    R_j = sum_i S_i W'_ij,   I = R / sum R                  rank and incentive
    B   <- (1 - a) B + a ((1 - p) W + p W')                 bonds per edge, EMA with rate a, penalty p
    D_i ~ S_i sum_j (B_ij / sum_k B_kj) I_j                 dividends, normalised

The rate a is one number, or with liquid alpha one per edge: a sigmoid of how far a weight is from the consensus (or
below the bond that it replaces). The older Yuma2 has the stake inside the bonds: dB_ij = S_i W_ij, columns normalised
before and after the EMA, and D_i ~ sum_j B_ij I_j.

Weights on oneself count only for the subnet's owner; weights on a neuron that registered at or after the row's last
update, or after its oldest commit that is not revealed yet, do not count, nor do bonds on one that registered since
the last epoch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class LiquidAlpha:
    """Bounds of the bonds' rate per edge, in [0, 1], and the sigmoid's steepness as the chain has it (1000: 10)."""

    low: float
    high: float
    steepness: float


@dataclass(frozen=True, slots=True)
class Subnet:
    """What an epoch starts from, for n neurons by uid.

    weights, bonds: (n, n), row i is validator i's. stake: (n,) in any unit, 0 where it is below the chain's threshold.
    permits, active: (n,) bools. last_update, registered_at: (n,) blocks. oldest_commit: (n,) blocks, of the oldest
    commit that waits to be revealed. bonds_since: bonds on who registered in this block or later are wiped. kappa,
    bonds_rate (a) and bonds_penalty (p) in [0, 1]. owner is a uid or None.
    """

    weights: Matrix
    bonds: Matrix
    stake: Vector
    permits: NDArray[np.bool_]
    active: NDArray[np.bool_]
    last_update: NDArray[np.int64]
    registered_at: NDArray[np.int64]
    bonds_since: int
    owner: int | None
    kappa: float
    bonds_rate: float
    bonds_penalty: float
    oldest_commit: NDArray[np.int64] | None = None
    liquid: LiquidAlpha | None = None
    yuma3: bool = True


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an epoch decides, (n,) each except the (n, n) bonds.

    Incentive and dividends sum to 1 or are all 0. stake: everybody's share; voting_stake: that of permitted, active
    validators, of theirs. emission: everybody's share of what is not the owner's cut. Yuma2's bonds are scaled so that
    the greatest of a column is 1.
    """

    consensus: Vector
    trust: Vector
    incentive: Vector
    dividends: Vector
    emission: Vector
    bonds: Matrix
    stake: Vector
    voting_stake: Vector


def epoch(subnet: Subnet) -> Outcome:
    """Run one epoch. Total stake or weights of zero give zeros, never NaN; emission then goes by stake."""
    stake = _normalise(subnet.stake)
    voting = _normalise(np.where(subnet.permits & subnet.active, stake, 0.0))
    weights = _effective_weights(subnet)
    consensus = weighted_median(weights, voting, subnet.kappa)
    clipped = np.minimum(weights, consensus)
    incentive = _normalise(voting @ clipped)
    toward = (1 - subnet.bonds_penalty) * weights + subnet.bonds_penalty * clipped
    if subnet.yuma3:
        bonds = _next_bonds(subnet, toward, consensus)
        dividends = _normalise(voting * (_columns_normalised(bonds) @ incentive))
    else:
        bonds, dividends = _yuma2(subnet, toward, voting, incentive)
    emission = _normalise(incentive + dividends)
    if not emission.any():
        emission = voting if voting.any() else stake
    return Outcome(
        consensus=consensus,
        trust=clipped.sum(axis=1),
        incentive=incentive,
        dividends=dividends,
        emission=emission,
        bonds=bonds,
        stake=stake,
        voting_stake=voting,
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
    if subnet.oldest_commit is not None:
        weights[subnet.oldest_commit[:, None] < subnet.registered_at[None, :]] = 0.0
    total = weights.sum(axis=1, keepdims=True)
    normalised: Matrix = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
    return normalised


def _old_bonds(subnet: Subnet) -> Matrix:
    bonds = subnet.bonds.copy()
    bonds[:, subnet.registered_at >= subnet.bonds_since] = 0.0
    return bonds


def _next_bonds(subnet: Subnet, toward: Matrix, consensus: Vector) -> Matrix:
    old = _old_bonds(subnet)
    rate: float | Matrix = subnet.bonds_rate
    if subnet.liquid is not None and consensus.any():
        rate = _liquid_rate(subnet.liquid, toward, old, consensus)
    bonds: Matrix = (1 - rate) * old + rate * toward
    return bonds


def _liquid_rate(liquid: LiquidAlpha, toward: Matrix, old: Matrix, consensus: Vector) -> Matrix:
    """Per edge: low near the consensus, high far above it (buying) or far below the old bond (selling)."""
    apart = np.clip(np.where(toward >= old, toward - consensus, old - toward), 0.0, 1.0)
    sigmoid = 1 / (1 + np.exp(-liquid.steepness / 100 * (apart - 0.5)))
    rate: Matrix = liquid.low + sigmoid * (liquid.high - liquid.low)
    return rate


def _yuma2(subnet: Subnet, toward: Matrix, voting: Vector, incentive: Vector) -> tuple[Matrix, Vector]:
    old = _columns_normalised(_old_bonds(subnet))
    bought = _columns_normalised(toward * voting[:, None])
    bonds = _columns_normalised((1 - subnet.bonds_rate) * old + subnet.bonds_rate * bought)
    top = bonds.max(axis=0, keepdims=True)
    return np.divide(bonds, top, out=np.zeros_like(bonds), where=top > 0), _normalise(bonds @ incentive)


def _columns_normalised(matrix: Matrix) -> Matrix:
    total = matrix.sum(axis=0, keepdims=True)
    normalised: Matrix = np.divide(matrix, total, out=np.zeros_like(matrix), where=total > 0)
    return normalised


def _normalise(values: Vector) -> Vector:
    total = float(values.sum())
    scaled: Vector = values / total if total > 0 else np.zeros_like(values)
    return scaled
