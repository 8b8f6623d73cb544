"""When a subnet's epochs fall: the counter of epochs, and the block at which the next one is due.

An epoch is due `tempo` blocks after the last. What happens in the very block in which one is due (commits, reveals)
already belongs to it, as on the real chain: the epoch's own run comes later in the same block.
"""

from __future__ import annotations

from subnet.localchain.state import Reader

_P = "SubtensorModule."


def is_due(state: Reader, netuid: int, number: int) -> bool:
    """Whether block `number` runs the subnet's epoch, seen from a state in which it has not run yet."""
    return number >= state.number(_P + "LastEpochBlock", netuid) + state.number(_P + "Tempo", netuid)


def index(state: Reader, netuid: int, number: int) -> int:
    """The epoch that block `number` belongs to."""
    return state.number(_P + "SubnetEpochIndex", netuid) + is_due(state, netuid, number)
