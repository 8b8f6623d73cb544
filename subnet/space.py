"""What the chain lets one hotkey commit: bytes per field, and bytes per epoch.

The numbers are the Commitments pallet's: a Raw field holds 128 bytes, and a commitment counts as the sum of its fields'
bytes, but never as less than 100, against `MaxSpace` bytes per hotkey, subnet and epoch. The two here are part of its
code; `MaxSpace` is a value on chain, 3,100 at genesis, and is read there.
"""

from __future__ import annotations

from dataclasses import dataclass

FIELD_LIMIT = 128
LEAST_CHARGE = 100


def charge(*fields: int) -> int:
    """What a commitment whose fields have these sizes counts as, in bytes."""
    return max(LEAST_CHARGE, sum(fields))


@dataclass(frozen=True, slots=True)
class Space:
    """What a hotkey has committed in an epoch, and may."""

    used: int
    """Bytes counted in this epoch so far."""
    limit: int
    """Bytes that it may have counted in one."""
    epoch: int
    """The epoch's index."""
    next_epoch: int
    """The block at which the next epoch begins, and the count anew."""
