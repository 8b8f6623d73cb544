"""What the switch does to a packet, without the packets: how large it is on a wire, and when it arrives. Pure.

TUN interfaces hand over TCP segments of up to 64 KiB unsplit, each behind a virtio-net header that says into which
packets hardware would split it (virtio 1.2, §5.1.6). A wire carries the packets, so it is their bytes that are counted.
"""

from __future__ import annotations

import math
import struct
from typing import Final

VNET_HEADER: Final = struct.Struct("=BBHHHH")
"""flags, gso_type, hdr_len, gso_size, csum_start, csum_offset."""
_IPV4: Final = 4


def destination(packet: bytes | bytearray, length: int) -> bytes | None:
    """The four bytes of a packet's IPv4 destination, None of what is no IPv4.

    `packet` begins with a `VNET_HEADER`; of its bytes `length` count.
    """
    ip = VNET_HEADER.size
    if length < ip + 20 or packet[ip] >> 4 != _IPV4:
        return None
    return bytes(packet[ip + 16 : ip + 20])


def wire_bytes(packet: bytes | bytearray, length: int) -> int:
    """Bytes of the IPv4 packets that this one stands for: headers are repeated in each of them. As above."""
    fields: tuple[int, ...] = VNET_HEADER.unpack_from(packet)
    segment, transport = fields[3], fields[4]
    size = length - VNET_HEADER.size
    if not segment:
        return size
    # `hdr_len` is only a hint (how much of it the sender held in one piece), so TCP says how long its header is.
    headers = transport + 4 * (packet[VNET_HEADER.size + transport + 12] >> 4)
    return size + (math.ceil((size - headers) / segment) - 1) * headers


class Wire:
    """One direction between two nodes: a bottleneck with a bounded queue before it, and the way behind it."""

    def __init__(self, *, bandwidth_bps: float, latency_s: float, queue_s: float) -> None:
        """
        Args:
            bandwidth_bps: bits per second.
            latency_s: seconds from the bottleneck to the other end.
            queue_s: what the queue holds, in seconds of the bottleneck's time. What finds it full is dropped.
        """
        self._seconds_per_byte = 8 / bandwidth_bps
        self._latency = latency_s
        self._queue = queue_s
        self._free_at = -math.inf
        self.dropped = 0
        self.carried = 0
        """Bytes."""

    def send(self, size: int, now: float) -> float | None:
        """When `size` bytes that are sent now will have arrived, in seconds; None if they are dropped."""
        start = max(now, self._free_at)
        if start - now > self._queue:
            self.dropped += 1
            return None
        self.carried += size
        self._free_at = start + size * self._seconds_per_byte
        return self._free_at + self._latency
