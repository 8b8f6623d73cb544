"""How long an extrinsic may land: a short mortal era that ends where it must."""

from __future__ import annotations

from subnet.chain_errors import ChainRefused

DEFAULT = 16
"""Blocks. An era is a power of two of them."""
SHORTEST = 4
LONGEST = 64


def ending_by(until: int, birth: int, what: str) -> int:
    """Blocks of the longest era that starts with block `birth` and ends with `until` or before. Raises
    `ChainRefused`."""
    blocks = until - birth + 1
    if blocks < SHORTEST:
        raise ChainRefused(
            f"{what}: block {until} is too near the finalized block {birth} (the shortest era is "
            f"{SHORTEST} blocks); publish earlier"
        )
    return int(min(LONGEST, 1 << (blocks.bit_length() - 1)))
