"""The pallets that this chain runs, and the table that `Context.dispatch` looks calls up in."""

from __future__ import annotations

from subnet.localchain.dispatch import Table
from subnet.localchain.pallets import (
    admin,
    balances,
    commit_reveal,
    commitments,
    registration,
    serving,
    shield,
    staking,
    utility,
    weights,
)

TABLE: Table = {
    "AdminUtils": admin.CALLS,
    "Balances": balances.CALLS,
    "Commitments": commitments.CALLS,
    "MevShield": shield.CALLS,
    "SubtensorModule": {
        **commit_reveal.CALLS,
        **registration.CALLS,
        **serving.CALLS,
        **staking.CALLS,
        **weights.CALLS,
    },
    "Utility": utility.CALLS,
}
