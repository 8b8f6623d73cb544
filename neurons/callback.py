"""Calling back who asks: how a machine learns, before it joins, whether others can reach it.

The desk is open to every registered hotkey, so it must be of no use to anybody else's harm. It calls only the address
that the request itself came from (a TCP connection proves that it is the caller's), sends that address one small
unsigned request, says nothing of what answers there but whether it is the caller's axon, and does so rarely: once per
caller and `PAUSE`, `AT_ONCE` at a time. An address of a private network is called only by who announces one itself;
elsewhere it may be a proxy or a gateway of the node's own, behind which nobody may look around.
"""

from __future__ import annotations

import asyncio
import ipaddress

from subnet.messages import CallBack, CalledBack
from subnet.transport.axon import Axon, Reply
from subnet.transport.dendrite import NO_SPECS, NO_TENSORS
from subnet.transport.errors import Busy
from subnet.transport.knock import knock
from subnet.transport.synapse import Received

DEADLINE = 5.0
"""Seconds for a call back."""
PAUSE = 10.0
"""Seconds between two calls back to one hotkey."""
AT_ONCE = 4


def plain(address: str) -> str:
    """An IPv4 address that came in over IPv6 (``::ffff:192.0.2.1``) as IPv4; others as they are. Raises ValueError."""
    found = ipaddress.ip_address(address.partition("%")[0])
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return str(mapped or found)


def is_public(address: str) -> bool:
    """Whether an IP address in digits is one of the public internet."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    return found.is_global and not found.is_multicast


class CallbackDesk:
    """One node's."""

    def __init__(self, announced: str) -> None:
        """`announced` is the address that this node tells others to reach it at."""
        self._public = is_public(announced)
        self._calling = 0
        self._last: dict[str, float] = {}
        """When whom was called last, in the loop's time; nobody longer than `PAUSE`."""

    def open(self, axon: Axon) -> None:
        axon.serve(CallBack, self.call_back, specs=NO_SPECS)

    async def call_back(self, caller: str, request: CallBack, received: Received) -> Reply:
        """Raises `Busy` for a caller who was called lately, and while as many as may be are being called."""
        now = asyncio.get_running_loop().time()
        self._last = {hotkey: last for hotkey, last in self._last.items() if now - last < PAUSE}
        if caller in self._last:
            wait = PAUSE - (now - self._last[caller])
            raise Busy(
                f"{caller[:60]} was called back less than {PAUSE:g} s ago",
                "ask again after the pause",
                retry_after=wait,
            )
        if self._calling >= AT_ONCE:
            raise Busy(f"{self._calling} callers are being called back, limit {AT_ONCE}", "ask again", retry_after=1.0)
        self._last[caller] = now
        source = plain(received.source)
        if self._public and not is_public(source):
            return CalledBack(source=source, outcome=None, seconds=0.0), NO_TENSORS
        self._calling += 1
        try:
            found = await knock(source, request.port, caller, deadline=DEADLINE)
        finally:
            self._calling -= 1
        return CalledBack(source=source, outcome=found.outcome, seconds=found.whole), NO_TENSORS
