"""Taking and giving a few megabytes: how a machine measures its way to a peer before it joins.

The desk is open to every registered hotkey, so it must be of no use to anybody else's harm. What it sends goes over
the TCP connection that asked, a transfer each way has a largest size, and there are few of them: `TRIES` per hotkey,
`ALL` in all within `PERIOD`. That is asked once the caller has proven who it is and before a body is read, so what is
over the quota costs this node a header.
"""

from __future__ import annotations

import asyncio
from collections import deque

import torch

from subnet.messages import SPEED_BYTES, Sped, Speed
from subnet.transport.axon import Axon, Reply
from subnet.transport.errors import OverQuota
from subnet.transport.synapse import HEADER_LIMIT, Received

PERIOD = 600.0
"""Seconds."""
TRIES = 4
ALL = 20
"""Together at most 1.1 Mbit/s each way."""


class SpeedDesk:
    """One node's."""

    def __init__(self) -> None:
        self._begun: deque[tuple[float, str]] = deque()
        """When by whom, in the loop's time, of the last `PERIOD`."""

    def open(self, axon: Axon) -> None:
        axon.serve(Speed, self.carry, specs=Speed.specs, max_bytes=HEADER_LIMIT + SPEED_BYTES, gate=self.grant)

    def grant(self, caller: str) -> None:
        """Count one more transfer of a caller. Raises `OverQuota`."""
        now = asyncio.get_running_loop().time()
        while self._begun and now - self._begun[0][0] >= PERIOD:
            self._begun.popleft()
        own = sum(hotkey == caller for _, hotkey in self._begun)
        if own >= TRIES or len(self._begun) >= ALL:
            raise OverQuota(
                f"{own} transfers of {caller[:60]} and {len(self._begun)} in all within {PERIOD:g} s, limits {TRIES} "
                f"and {ALL}",
                "ask another peer, or again later",
            )
        self._begun.append((now, caller))

    async def carry(self, _caller: str, request: Speed, _received: Received) -> Reply:
        noise = torch.randint(256, (1, request.down), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        return Sped(down=request.down), {"data": noise}  # zeros would be compressed on some ways
