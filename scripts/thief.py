"""Somebody else on a port where a node was: it answers, and nothing that it says makes sense."""

from __future__ import annotations

import contextlib
import socket
import threading

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"
LONGEST = 5.0
"""Seconds that it listens to somebody."""


class Thief:
    """Listens until it is closed."""

    def __init__(self, host: str, port: int) -> None:
        """Raises `OSError` if somebody has the port."""
        self._listening = socket.create_server((host, port))
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                sock, _ = self._listening.accept()
            except OSError:
                return  # closed
            with contextlib.suppress(OSError), sock:
                sock.settimeout(LONGEST)
                if sock.recv(1 << 16):
                    sock.sendall(ANSWER)

    def close(self) -> None:
        """Leave the port."""
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self._thread.join(LONGEST + 1)
