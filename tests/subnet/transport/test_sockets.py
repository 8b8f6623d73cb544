"""How connections are set, on both ends."""

from __future__ import annotations

import contextlib
import socket

import pytest

from subnet.transport import sockets


def permitted() -> bool:
    with socket.socket() as sock:
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"bbr")
        except (OSError, AttributeError):
            return False
    return True


def congestion_control(sock: socket.socket) -> str:
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0").decode()


@pytest.mark.parametrize(("host", "far"), [("0.0.0.0", "192.0.2.1"), ("127.0.0.1", "127.0.0.1")])  # noqa: S104
def test_both_ends_send_at_once_and_by_bbr_where_that_helps_and_is_permitted(host: str, far: str) -> None:
    with contextlib.ExitStack() as ends:
        default = congestion_control(ends.enter_context(socket.socket()))
        wanted = "bbr" if permitted() and far != "127.0.0.1" else default
        listening = ends.enter_context(sockets.listening(host, 0))
        near = ends.enter_context(sockets.outgoing(socket.AF_INET, far))
        assert near.gettimeout() == listening.gettimeout() == 0.0
        near.setblocking(True)
        listening.setblocking(True)
        near.connect(("127.0.0.1", listening.getsockname()[1]))
        accepted = ends.enter_context(listening.accept()[0])
        for end in (near, accepted):
            assert end.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert congestion_control(end) == wanted
