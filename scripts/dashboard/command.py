"""`orion dashboard`: the page of a run's folder, until Ctrl-C; and the same beside `orion localnet`."""

from __future__ import annotations

import asyncio
import ipaddress
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from errno import EADDRINUSE
from pathlib import Path

from aiohttp import web

from scripts.dashboard.errors import DashboardError
from scripts.dashboard.feed import check_run
from scripts.dashboard.peers import parse_peers
from scripts.dashboard.server import Dashboard
from scripts.dashboard.yardstick import NOTHING_NAMED, Yardstick
from subnet.commandline import status_of

HOST = "127.0.0.1"
STOPPED = 130
PATIENCE = 3.0
"""Seconds that requests have to end in."""


def dashboard(
    run: Path | None,
    *,
    host: str,
    port: int,
    peers: str | None = None,
    gpu: str | None = None,
    price: float | None = None,
    target: str | None = None,
) -> int:
    """Serve a run, or `peers` where it is None, until stopped: 130; 1 if it cannot be served, 2 for options that say
    nothing."""
    try:
        yardstick = Yardstick.of(gpu=gpu, price=price, target=target)
        asked = () if peers is None else parse_peers(peers)
        if run is not None:
            check_run(run)
        asyncio.run(_until_stopped(run, host, port, yardstick, asked))
    except DashboardError as error:
        print(f"orion dashboard: {error}", file=sys.stderr)
        return status_of(error)
    return STOPPED


async def _until_stopped(run: Path | None, host: str, port: int, yardstick: Yardstick, peers: Sequence[str]) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)

    def ready(address: str) -> None:
        what = f"{len(peers)} nodes" if run is None else run
        print(f"{address} shows {what}; Ctrl-C ends it", flush=True)
        if not is_loopback(host):
            print(f"--host {host}: whoever reaches this address can read the run; nothing can be changed", flush=True)

    await serve(run, host=host, port=port, ready=ready, stop=stop, yardstick=yardstick, peers=peers)


async def serve(
    run: Path | None,
    *,
    host: str,
    port: int,
    ready: Callable[[str], None],
    stop: asyncio.Event,
    yardstick: Yardstick = NOTHING_NAMED,
    peers: Sequence[str] = (),
) -> None:
    """Serve until `stop`; `ready` gets the page's address. Raises `DashboardError`."""
    board = Dashboard(run, host, yardstick, peers)
    await board.feed.first()
    runner = web.AppRunner(board.application(), handle_signals=False, access_log=None, shutdown_timeout=PATIENCE)
    await runner.setup()
    following = asyncio.create_task(board.feed.follow())
    try:
        site = web.TCPSite(runner, host, port)
        try:
            await site.start()
        except (OSError, OverflowError) as error:
            raise _unbound(host, port, error) from error
        address = runner.addresses[0]
        ready(f"http://{f'[{host}]' if ':' in host else host}:{address[1]}")
        stopped = asyncio.create_task(stop.wait())
        done, _ = await asyncio.wait({stopped, following}, return_when=asyncio.FIRST_COMPLETED)
        if following in done:  # logs that cannot be read any more: the page stays and says so
            following.result()
        await stopped
    finally:
        board.close()
        following.cancel()
        with suppress(asyncio.CancelledError):
            await following
        await runner.cleanup()


def _unbound(host: str, port: int, error: OSError | OverflowError) -> DashboardError:
    if isinstance(error, OSError) and error.errno == EADDRINUSE:
        return DashboardError(f"--port {port} is taken on {host}: give another, or 0 for any that is free")
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return DashboardError(f"--host {host} --port {port} cannot be bound ({reason}): give an address of this machine")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Beside:
    """The page of a run in a thread of its own, while the main thread does something else."""

    def __init__(self, run: Path, *, port: int) -> None:
        """Returns once it is served. Raises `DashboardError`."""
        self._ready: Future[str] = Future()
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._serve, args=(run, port), name="dashboard", daemon=True)
        self._thread.start()
        self.address = self._ready.result()

    def _serve(self, run: Path, port: int) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            try:
                runner.run(serve(run, host=HOST, port=port, ready=self._ready.set_result, stop=self._stop))
            except DashboardError as error:
                self._ready.set_exception(error)
            finally:
                if not self._ready.done():
                    self._ready.set_exception(DashboardError("the page ended before it was served"))

    def close(self) -> None:
        """Streams end, the port is free again."""
        if self._thread.is_alive():
            with suppress(RuntimeError):  # the loop has ended in between
                self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(2 * PATIENCE)
