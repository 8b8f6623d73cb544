"""The one place where sockets are made and tuned.

BBR keeps a lossy internet link busy where cubic collapses (0.1 % loss at 50 ms: 142 against 10 Mbit/s for
one boundary tensor), and does not start over after an idle second. Linux lets a process choose it per
socket when the module is there and permitted; elsewhere the default stays, and so it does on loopback, which
loses nothing, and where BBR's pacing only waits for timers. Buffer sizes are left to the
kernel: setting one switches its autotuning off, and caps at `net.core.rmem_max`, which on a stock system
(208 KiB) is far below what a 1 Gbit/s link needs. But of what they hold only `UNSENT` bytes may wait to be
sent, so that what a sender gives up, or a round that ends, leaves little behind. TCP_NODELAY, because a message's
last segment waits for nobody.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from subnet.transport.errors import PortTaken

UNSENT: Final = 2 * 1024 * 1024
"""80 ms of a link of 200 Mbit/s. The loop is woken at half of it, and leaves no gap if it is late by the other half."""


def outgoing(family: int, host: str | int) -> socket.socket:
    """A non-blocking socket for one connection to an address of this family, `host` in digits."""
    sock = _tuned(socket.socket(family, socket.SOCK_STREAM), str(host))
    sock.setblocking(False)
    return sock


def listening(host: str, port: int) -> socket.socket:
    """A bound socket; connections it accepts inherit what it is set to.

    Args:
        host: an IPv4 or IPv6 address of this machine; ``0.0.0.0`` or ``::`` for all.
        port: 0 lets the kernel choose.

    Raises:
        PortTaken: the address cannot be bound.
    """
    version = ipaddress.ip_address(host).version
    sock = _tuned(socket.socket(socket.AF_INET6 if version == 6 else socket.AF_INET, socket.SOCK_STREAM), host)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # else a restart waits for TIME_WAIT
    try:
        sock.bind((host, port))
        sock.listen(socket.SOMAXCONN)
    except OSError as error:
        sock.close()
        raise PortTaken(
            f"cannot listen on {host} port {port} ({error.strerror}); choose a free one with --port (0 picks one)"
        ) from None
    sock.setblocking(False)
    return sock


@dataclass(frozen=True, slots=True)
class Sockets:
    """Where a node gets its sockets: this machine's, unless told otherwise."""

    outgoing: Callable[[int, str | int], socket.socket] = outgoing
    listening: Callable[[str, int], socket.socket] = listening


THIS_MACHINE: Final = Sockets()


def _tuned(sock: socket.socket, host: str) -> socket.socket:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if ipaddress.ip_address(host).is_loopback:
        return sock
    with suppress(OSError, AttributeError):  # no such option on this system, or not permitted
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"bbr")
    with suppress(OSError, AttributeError):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT)
    return sock
