"""How connections are set, on both ends."""

from __future__ import annotations

import contextlib
import socket

from subnet.transport import sockets


def permitted() -> bool:
    with socket.socket() as sock:
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"bbr")
        except (OSError, AttributeError):
            return False
    return True


def test_both_ends_send_at_once_and_by_bbr_where_it_is_permitted() -> None:
    with contextlib.ExitStack() as ends:
        listening = ends.enter_context(sockets.listening("127.0.0.1", 0))
        near = ends.enter_context(sockets.outgoing(socket.AF_INET))
        assert near.gettimeout() == listening.gettimeout() == 0.0
        near.setblocking(True)
        listening.setblocking(True)
        near.connect(listening.getsockname())
        far = ends.enter_context(listening.accept()[0])
        for end in (near, far):
            assert end.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            if permitted():
                name = end.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16)
                assert name.rstrip(b"\0") == b"bbr"
