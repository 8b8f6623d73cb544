"""Serves the page: fixed files, the state at a moment, and a stream of what changes. Nothing else, and only to read."""

from __future__ import annotations

import asyncio
import ipaddress
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from urllib.parse import urlsplit

from aiohttp import web

from scripts.dashboard.errors import DashboardError
from scripts.dashboard.feed import Feed, Frame, Teller
from scripts.dashboard.metrics import CONTENT_TYPE, exposition
from scripts.dashboard.peers import PeersFeed
from scripts.dashboard.state import joined
from scripts.dashboard.yardstick import Yardstick

STATIC: dict[str, str] = {
    "index.html": "text/html",
    "app.js": "text/javascript",
    "dom.js": "text/javascript",
    "panels.js": "text/javascript",
    "plots.js": "text/javascript",
    "style.css": "text/css",
    "icon.svg": "image/svg+xml",
    "vendor/uPlot.iife.min.js": "text/javascript",
    "vendor/uPlot.min.css": "text/css",
    "vendor/uPlot.LICENSE": "text/plain",
}
"""Every file that is served, by its path under static/, with its type."""
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
STREAMS = 32
"""Open at once."""
RETELLINGS = 2
"""Replays that fold events at the same moment: each has a core's work."""
KEEP_ALIVE = 15.0
"""Seconds after which a silent stream says that it is there."""
TICK = 0.25
"""Seconds between two frames of a replay."""
FASTEST = 1000.0


@dataclass(frozen=True, slots=True)
class Moment:
    """Where a replay begins, in seconds since the epoch, and how many seconds of the run pass in one."""

    at: float
    speed: float


class Dashboard:
    """The handlers. `host` is what the server is bound to; without a run, `peers` are looked at."""

    def __init__(self, run: Path | None, host: str, yardstick: Yardstick, peers: Sequence[str] = ()) -> None:
        self._run, self._yardstick = run, yardstick
        self._host = host
        self._files = {name: files("scripts.dashboard").joinpath("static", name).read_bytes() for name in STATIC}
        self.feed = PeersFeed(peers) if run is None else Feed(run, yardstick)
        self._streams = 0
        self._retelling = asyncio.Semaphore(RETELLINGS)
        self._closing = asyncio.Event()

    def application(self) -> web.Application:
        application = web.Application(middlewares=[self._guard])
        application.router.add_get("/", self._page)
        application.router.add_get("/static/{name:.+}", self._file)
        application.router.add_get("/state", self._state)
        application.router.add_get("/events", self._events, allow_head=False)
        application.router.add_get("/metrics", self._metrics)
        return application

    def close(self) -> None:
        """Streams end."""
        self._closing.set()

    @web.middleware
    async def _guard(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """A page of another site must not read this one under a name that it has pointed here."""
        if not _is_own_name(request.host, self._host):
            return _refusal(
                403, f"host {request.host!r} is not this server's: use its address, or start it with --host"
            )
        try:
            response = await handler(request)
        except web.HTTPException as error:
            response = _refusal(error.status, error.reason)
            response.headers.update({name: error.headers[name] for name in ("Allow",) if name in error.headers})
        if not response.prepared:
            response.headers.update(HEADERS)
        return response

    async def _page(self, _request: web.Request) -> web.Response:
        return self._static("index.html")

    async def _file(self, request: web.Request) -> web.Response:
        return self._static(request.match_info["name"])

    def _static(self, name: str) -> web.Response:
        if name not in self._files:
            return _refusal(404, "there is no such file")
        response = web.Response(body=self._files[name], content_type=STATIC[name], charset="utf-8")
        response.enable_compression()
        return response

    async def _state(self, request: web.Request) -> web.Response:
        """Everything as one JSON object: now, or at the moment `at`."""
        try:
            moment = _moment(request)
            frame = self.feed.frame if moment is None else await self._retold(self._teller(), moment.at)
        except DashboardError as error:
            return _refusal(400, str(error))
        except OSError as error:
            return _refusal(503, f"logs cannot be read ({error.strerror})")
        return web.Response(body=joined(frame.sections), content_type="application/json")

    async def _metrics(self, _request: web.Request) -> web.Response:
        """For Prometheus, as of the newest look at the logs."""
        state = self.feed.frame.state
        if state is None:
            return _refusal(404, "metrics are of a run: start it with --run")
        text = await asyncio.to_thread(exposition, state)
        return web.Response(body=text, headers={"Content-Type": CONTENT_TYPE})

    def _teller(self) -> Teller:
        """Raises `DashboardError` where there is nothing to tell."""
        if self._run is None:
            raise DashboardError("what nodes elsewhere have said is not kept: leave out at, or start it with --run")
        return Teller(self._run, self._yardstick)

    async def _retold(self, teller: Teller, at: float) -> Frame:
        def retell() -> Frame:
            teller.tell(at)
            return teller.frame(at=at, end=self.feed.frame.end)

        async with self._retelling:
            return await asyncio.to_thread(retell)

    async def _events(self, request: web.Request) -> web.StreamResponse:
        """Server-sent events: `state`, an object of the sections that have changed; `end` when a replay is over."""
        try:
            moment = _moment(request)
        except DashboardError as error:
            return _refusal(400, str(error))
        if self._streams >= STREAMS:
            return _refusal(503, f"{STREAMS} pages are open already: close one")
        response = web.StreamResponse(headers={**HEADERS, "Content-Type": "text/event-stream"})
        self._streams += 1
        try:
            await response.prepare(request)
            if moment is None:
                await self._live(response)
            else:
                await self._replay(response, moment)
        except ConnectionError:
            pass  # the page has gone
        except (DashboardError, OSError):
            await response.write(b"event: end\ndata: {}\n\n")  # the live stream says what is wrong
        finally:
            self._streams -= 1
        return response

    async def _live(self, response: web.StreamResponse) -> None:
        frame, sent = self.feed.frame, _Sent()
        await response.write(sent.changes(frame))
        while not self._closing.is_set():
            newer = asyncio.ensure_future(self.feed.after(frame))
            closing = asyncio.ensure_future(self._closing.wait())
            try:
                await asyncio.wait({newer, closing}, timeout=KEEP_ALIVE, return_when=asyncio.FIRST_COMPLETED)
                if newer.done():
                    frame = newer.result()
                    await response.write(sent.changes(frame))
                elif not closing.done():
                    await response.write(b": still here\n\n")
            finally:
                newer.cancel()
                closing.cancel()

    async def _replay(self, response: web.StreamResponse, moment: Moment) -> None:
        teller, sent, began = self._teller(), _Sent(), time.monotonic()
        while not self._closing.is_set():
            at = moment.at + (time.monotonic() - began) * moment.speed
            end = self.feed.frame.end
            over = end is None or at >= end
            frame = await self._retold(teller, at if end is None else min(at, end))
            await response.write(sent.changes(frame))
            if over:
                break
            await asyncio.sleep(TICK)
        await response.write(b"event: end\ndata: {}\n\n")


class _Sent:
    """What one page has been sent."""

    def __init__(self) -> None:
        self._sections: dict[str, bytes] = {}

    def changes(self, frame: Frame) -> bytes:
        """The event that brings the page up to date."""
        new = {name: text for name, text in frame.sections.items() if self._sections.get(name) != text}
        self._sections = frame.sections
        return b"event: state\ndata: " + joined(new) + b"\n\n"


def _refusal(status: int, line: str) -> web.Response:
    return web.Response(status=status, text=line + "\n", headers=HEADERS)


def _moment(request: web.Request) -> Moment | None:
    """From `at` and `speed`; None without `at`. Raises `DashboardError`."""
    if "at" not in request.query:
        return None
    speed = _number(request, "speed", 1.0)
    if not 0 < speed <= FASTEST:
        raise DashboardError(f"speed {speed:g} is outside 0 to {FASTEST:g}: choose one inside")
    return Moment(_number(request, "at", 0.0), speed)


def _number(request: web.Request, name: str, default: float) -> float:
    text = request.query.get(name)
    try:
        value = default if text is None else float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise DashboardError(f"{name} must be a number of seconds")
    return value


def _is_own_name(given: str, bound: str) -> bool:
    """Whether a Host header names this machine itself: an address, localhost, or what the server is bound to."""
    try:
        name = urlsplit(f"//{given}").hostname or ""
    except ValueError:
        return False
    if name in {"localhost", bound.lower()}:
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
