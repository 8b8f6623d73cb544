"""The pallets that this chain runs, and the table that `Context.dispatch` looks calls up in."""

from __future__ import annotations

from subnet.localchain.dispatch import Table
from subnet.localchain.pallets import balances, commitments, registration, serving, staking, utility, weights

TABLE: Table = {
    "Balances": balances.CALLS,
    "Commitments": commitments.CALLS,
    "SubtensorModule": {**registration.CALLS, **serving.CALLS, **staking.CALLS, **weights.CALLS},
    "Utility": utility.CALLS,
}
