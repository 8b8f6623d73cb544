"""A TUN interface: what the kernel sends through it is read from a file, what is written to the file is received.

Opened with virtio-net headers and offloads (linux/Documentation/networking/tuntap.rst; include/uapi/linux/if_tun.h):
the kernel leaves large TCP segments whole and checksums undone, and says so in the header. Written to another TUN
interface with the same header they are taken as they are. That saves splitting, joining and summing, and it is what
lets a switch in Python carry gigabits.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from pathlib import Path
from typing import Final

from scripts.bench.links.namespace import LinksError

DEVICE: Final = Path("/dev/net/tun")
INTERFACE: Final = "orion0"
MTU: Final = 1500

_TUNSETIFF: Final = 0x400454CA
_TUNSETOFFLOAD: Final = 0x400454D0
_IFF_TUN: Final = 0x0001
_IFF_NO_PI: Final = 0x1000
_IFF_VNET_HDR: Final = 0x4000
_OFFLOADS: Final = 0x01 | 0x02
"""Checksums and TCP segmentation over IPv4."""

_SIOCGIFFLAGS: Final = 0x8913
_SIOCSIFFLAGS: Final = 0x8914
_SIOCSIFADDR: Final = 0x8916
_SIOCSIFNETMASK: Final = 0x891C
_SIOCSIFMTU: Final = 0x8922
_IFF_UP: Final = 0x1


def open_tun(address: str, netmask: str) -> int:
    """Make the interface in the namespace of this thread and bring it and loopback up; its file, not blocking.

    It is gone when the file is closed. Raises `LinksError`.
    """
    try:
        fd = os.open(DEVICE, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise LinksError(f"cannot open {DEVICE} ({error.strerror}): load the tun module and be root") from error
    try:
        fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", INTERFACE.encode(), _IFF_TUN | _IFF_NO_PI | _IFF_VNET_HDR))
        fcntl.ioctl(fd, _TUNSETOFFLOAD, _OFFLOADS)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
            _set(control, _SIOCSIFADDR, INTERFACE, _sockaddr(address))
            _set(control, _SIOCSIFNETMASK, INTERFACE, _sockaddr(netmask))
            _set(control, _SIOCSIFMTU, INTERFACE, struct.pack("i", MTU))
            for name in (INTERFACE, "lo"):
                request = struct.pack("16sH22x", name.encode(), 0)
                flags = struct.unpack_from("16sH", fcntl.ioctl(control, _SIOCGIFFLAGS, request))[1]
                _set(control, _SIOCSIFFLAGS, name, struct.pack("H", flags | _IFF_UP))
    except OSError as error:
        os.close(fd)
        raise LinksError(f"cannot set up a TUN interface ({error.strerror}): this needs Linux and root") from error
    return fd


def _set(control: socket.socket, request: int, name: str, value: bytes) -> None:
    fcntl.ioctl(control, request, struct.pack("16s24s", name.encode(), value))


def _sockaddr(address: str) -> bytes:
    return struct.pack("=HH4s8x", socket.AF_INET, 0, socket.inet_aton(address))
