"""`orion dashboard --peers`: which nodes of a run elsewhere answer.

All that a node tells a stranger is `GET /health`: its hotkey and what it serves. That is asked, of the addresses given
and no others, and nothing else is.
"""

from __future__ import annotations

import asyncio
import ipaddress
import time
from collections.abc import Sequence
from dataclasses import replace
from urllib.parse import urlsplit

import aiohttp
from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from scripts.dashboard.errors import OptionError
from scripts.dashboard.feed import Frame
from scripts.dashboard.state import Peer, Peers, Run

MOST = 256
PAUSE = 5.0
"""Seconds between two rounds of questions."""
DEADLINE = 5.0
AT_ONCE = 32
LIMIT = 8 * 1024
"""Bytes of an answer."""
PATH = "/health"


class _Health(BaseModel):
    """What an axon says of itself (`subnet.transport.axon`)."""

    hotkey: str = Field(min_length=1, max_length=64)
    routes: list[str] = Field(max_length=64)


def parse_peers(text: str) -> tuple[str, ...]:
    """Addresses like http://192.0.2.7:8091, separated by commas, as `IP:PORT`. Raises `DashboardError`."""
    found = tuple(_parsed(part.strip()) for part in text.split(","))
    if len(found) > MOST:
        raise OptionError(f"--peers names {len(found)} nodes, the most is {MOST}: name fewer")
    for address in found:
        if found.count(address) > 1:
            raise OptionError(f"--peers names {address} twice: name it once")
    return found


def _parsed(text: str) -> str:
    try:
        url = urlsplit(text if "://" in text else f"http://{text}")
        address, port = ipaddress.ip_address(url.hostname or ""), url.port
    except ValueError:
        address, port, url = None, None, urlsplit("")
    bare = url.path in {"", "/"} and not url.query and not url.fragment and url.username is None
    if address is None or not port or url.scheme != "http" or not bare:
        raise OptionError(f"--peers {text!r} is not of the form http://192.0.2.7:8091: give an axon's IP and port")
    return f"[{address}]:{port}" if address.version == 6 else f"{address}:{port}"


class PeersFeed:
    """The newest frame of who answers; the same to a server as `scripts.dashboard.feed.Feed`."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self._peers = [Peer(address) for address in addresses]
        self._begin = time.time()
        self._changed = asyncio.Event()
        self.frame = self._frame()

    async def first(self) -> None:
        """Ask everybody once."""
        await self._ask_all()

    async def follow(self) -> None:
        """Ask again and again, until cancelled."""
        while True:
            await asyncio.sleep(PAUSE)
            await self._ask_all()

    async def after(self, frame: Frame) -> Frame:
        """The newest frame, as soon as it is another than this one."""
        while self.frame is frame:
            await self._changed.wait()
        return self.frame

    async def _ask_all(self) -> None:
        connector = aiohttp.TCPConnector(limit=AT_ONCE, force_close=True)
        async with aiohttp.ClientSession(
            connector=connector, cookie_jar=aiohttp.DummyCookieJar(), trust_env=False
        ) as session:
            self._peers = list(await asyncio.gather(*(_asked(session, peer) for peer in self._peers)))
        self.frame = self._frame()
        self._changed.set()
        self._changed = asyncio.Event()

    def _frame(self) -> Frame:
        now = time.time()
        run = Run(
            name=f"{len(self._peers)} nodes",
            folder="peers",
            status="running",
            round=-1,
            rounds=None,
            begin=self._begin,
            at=now,
            end=now,
            torn=0,
            problem="",
        )
        parts = {"run": TypeAdapter(Run).dump_json(run), "peers": TypeAdapter(Peers).dump_json(Peers(self._peers))}
        return Frame(parts, now, None)


async def _asked(session: aiohttp.ClientSession, peer: Peer) -> Peer:
    """What it says now."""
    clock = asyncio.get_running_loop().time
    asked = replace(peer, asked=peer.asked + 1, answers=False, seconds=None)
    try:
        async with asyncio.timeout(DEADLINE):
            began = clock()
            async with session.get(f"http://{peer.address}{PATH}", allow_redirects=False) as answer:
                body = await _bounded(answer)
            took = clock() - began
        if answer.status != 200:
            return replace(asked, why=f"status {answer.status}")
        health = _Health.model_validate_json(body)
    except TimeoutError:
        return replace(asked, why=f"no answer within {DEADLINE:g} s")
    except aiohttp.ClientError as error:
        refused = isinstance(error, aiohttp.ClientConnectorError)
        return replace(asked, why="no connection" if refused else "no axon answers there")
    except (ValidationError, _TooLarge):
        return replace(asked, why="what answers is no axon")
    return replace(
        asked,
        answers=True,
        answered=peer.answered + 1,
        hotkey=health.hotkey,
        routes=len(health.routes),
        seconds=took,
        seen=time.time(),
        why="",
    )


class _TooLarge(Exception):  # noqa: N818 - never leaves this file
    """An answer has more bytes than one of an axon."""


async def _bounded(answer: aiohttp.ClientResponse) -> bytes:
    """At most `LIMIT` bytes of it, and not one read more. Raises `_TooLarge`."""
    body = b""
    async for part in answer.content.iter_chunked(LIMIT):
        body += part
        if len(body) > LIMIT:
            raise _TooLarge
    return body
