"""Nodes and the links between them, there from `with Network(...)` to its end."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Final, Self, TypeVar

from scripts.bench.links.namespace import LinksError, Namespace
from scripts.bench.links.switch import Passed, Spec
from scripts.bench.links.tun import INTERFACE, open_tun
from subnet.transport.shaping import Link

T = TypeVar("T")

QUEUE_S: Final = 0.5
"""What a link's queue holds, in seconds: more than a window of BBR that starts up, so that nothing is dropped."""
CONGESTION: Final = "bbr"
"""Congestion control of every node: what `subnet.transport.sockets` asks for, so that others have it too."""
_SETTINGS: Final = Path("/proc/sys/net/ipv4")
_BURST_RTT: Final = "25"
"""log2 of the round trip in µs up to which TCP hands over full 64 KiB segments. They leave one after the other at the
link's pace all the same, and the switch works a third less than with the kernel's default, 512 µs."""
_BUFFERS: Final = "4096 131072 16777216"
"""Bytes of a connection's buffers: least, first and most. Linux comes with a most of 4 MiB to send, of which 3 MB are
data: less than is under way when both directions of a link of 200 Mbit/s and 50 ms are full."""
_STOP_SECONDS: Final = 10.0


class Network:
    """Each node in a network namespace, every ordered pair of them joined by a link of its own."""

    interface: Final = INTERFACE
    """Its name, the same in every node."""

    def __init__(self, nodes: int, link: Link, *, queue_s: float = QUEUE_S) -> None:
        """
        Args:
            link: from each node to each other one, at `up_bps`. Only what finds the queue full is lost: `link.loss`
                must be 0.
            queue_s: what that queue holds, in seconds of the link's time.

        Raises:
            LinksError: this needs Linux, root, /dev/net/tun and TCP BBR.
        """
        if link.loss:
            raise LinksError(f"a loss of {link.loss:.3%} per segment is not emulated: only full queues drop")
        self.hosts = tuple(f"10.73.{number // 250}.{number % 250 + 1}" for number in range(nodes))
        """Address per node."""
        self.passed: Passed | None = None
        """What the switch says at the end."""
        self._held = contextlib.ExitStack()
        self._spaces: list[Namespace] = []
        try:
            files = [self._open(host) for host in self.hosts]
            spec = Spec(
                interfaces=dict(zip(self.hosts, files, strict=True)),
                bandwidth_bps=link.up_bps,
                latency_s=link.latency_s,
                queue_s=queue_s,
            )
            self._switch = subprocess.Popen(
                [sys.executable, "-m", "scripts.bench.links.switch", json.dumps(asdict(spec))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=files,
            )
        except BaseException:
            self._held.close()
            raise

    def _open(self, host: str) -> int:
        space = self._held.enter_context(Namespace())
        self._spaces.append(space)

        def inside() -> int:
            fd = open_tun(host, "255.255.0.0")
            self._held.callback(os.close, fd)
            _configure()
            return fd

        return space.call(inside)

    def call(self, node: int, function: Callable[[], T]) -> T:
        """What `function` returns or raises on a thread of that node: sockets it makes are the node's."""
        return self._spaces[node].call(function)

    def enter(self, node: int) -> list[str]:
        """Words to put before a command that is to run on that node."""
        return self._spaces[node].enter()

    def close(self) -> None:
        """End the switch and let go of the namespaces; they vanish with the last process in them."""
        if self._switch.returncode is not None:
            return
        try:
            said, _ = self._switch.communicate(timeout=_STOP_SECONDS)
            self.passed = Passed(**json.loads(said)) if self._switch.returncode == 0 else None
        finally:
            self._switch.kill()
            self._switch.wait()
            self._held.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _configure() -> None:
    """Set what TCP does in the namespace of this thread. Raises `LinksError`."""
    try:
        (_SETTINGS / "tcp_congestion_control").write_text(CONGESTION)
    except OSError as error:
        raise LinksError(
            f"TCP {CONGESTION} may not be chosen in a namespace ({error.strerror}): load tcp_{CONGESTION} and add it "
            "to net.ipv4.tcp_allowed_congestion_control"
        ) from error
    for name in ("tcp_wmem", "tcp_rmem"):
        (_SETTINGS / name).write_text(_BUFFERS)
    with contextlib.suppress(FileNotFoundError):  # Linux before 5.18: smaller segments, the same result
        (_SETTINGS / "tcp_tso_rtt_log").write_text(_BURST_RTT)
