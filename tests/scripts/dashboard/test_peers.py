"""Nodes elsewhere: who answers is shown, nothing but `/health` is asked, and no answer can do harm."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from scripts.bench.browser import CHROMIUM, chromium
from scripts.dashboard import peers as module
from scripts.dashboard.command import HOST, serve
from scripts.dashboard.errors import DashboardError
from scripts.dashboard.peers import LIMIT, MOST, PeersFeed, parse_peers
from scripts.dashboard.state import Peer

HEALTH = {"hotkey": "5Good", "routes": ["forward", "backward"]}


class Elsewhere:
    """Servers that answer, each in its own way; what they were asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        self.runners: list[web.AppRunner] = []

    async def start(self, answer: object, *, status: int = 200, headers: dict[str, str] | None = None) -> str:
        async def say(request: web.Request) -> web.Response:
            self.asked.append((request.method, request.path_qs))
            body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            return web.Response(body=body, status=status, headers=headers)

        application = web.Application()
        application.router.add_route("*", "/{path:.*}", say)
        runner = web.AppRunner(application)
        await runner.setup()
        await web.TCPSite(runner, HOST, 0).start()
        self.runners.append(runner)
        return f"{HOST}:{runner.addresses[0][1]}"


@pytest.fixture
async def elsewhere() -> AsyncIterator[Elsewhere]:
    servers = Elsewhere()
    yield servers
    for runner in servers.runners:
        await runner.cleanup()


async def asked(*addresses: str) -> list[Peer]:
    feed = PeersFeed(addresses)
    await feed.first()
    return [Peer(**peer) for peer in json.loads(feed.frame.sections["peers"])["peers"]]


async def test_who_answers_and_who_does_not(elsewhere: Elsewhere) -> None:
    good = await elsewhere.start(HEALTH)
    gone = await elsewhere.start(HEALTH)
    await elsewhere.runners[1].cleanup()
    here, away = await asked(good, gone)
    assert (here.answers, here.hotkey, here.routes, here.asked, here.answered) == (True, "5Good", 2, 1, 1)
    assert here.seconds is not None
    assert (away.answers, away.why, away.answered, away.seen) == (False, "no connection", 0, None)
    assert elsewhere.asked == [("GET", "/health")]


async def test_answers_that_are_none(elsewhere: Elsewhere) -> None:
    target = await elsewhere.start(HEALTH)
    cases = {
        await elsewhere.start({"hotkey": 7}): "what answers is no axon",
        await elsewhere.start(b"{" * (LIMIT // 2)): "what answers is no axon",
        await elsewhere.start({**HEALTH, "hotkey": "5" * 65}): "what answers is no axon",
        await elsewhere.start(b"x" * (4 * LIMIT)): "what answers is no axon",
        await elsewhere.start(HEALTH, status=500): "status 500",
        await elsewhere.start(b"", status=302, headers={"Location": f"http://{target}/health"}): "status 302",
    }
    assert {peer.address: peer.why for peer in await asked(*cases)} == cases
    assert len(elsewhere.asked) == len(cases)  # nobody was sent on to the target


async def test_who_says_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DEADLINE", 0.2)
    server = await asyncio.start_server(lambda _reader, _writer: asyncio.Event().wait(), HOST, 0)
    async with server:
        (silent,) = await asked(f"{HOST}:{server.sockets[0].getsockname()[1]}")
    assert silent.why == "no answer within 0.2 s"


def test_addresses_are_looked_at_before_anybody_is_asked() -> None:
    assert parse_peers("http://192.0.2.7:8091, 192.0.2.8:1/,http://[2001:db8::1]:80") == (
        "192.0.2.7:8091",
        "192.0.2.8:1",
        "[2001:db8::1]:80",
    )
    for text in (
        *("", "192.0.2.7", "a.example:80", "https://192.0.2.7:1", "http://u@192.0.2.7:1", "http://192.0.2.7:0"),
        *(
            "http://192.0.2.7:1/x",
            "http://192.0.2.7:1?x",
            "http://192.0.2.7:65536",
            "file:///etc/passwd",
            "192.0.2.7:1,",
        ),
    ):
        with pytest.raises(DashboardError, match="is not of the form"):
            parse_peers(text)
    with pytest.raises(DashboardError, match="twice"):
        parse_peers("192.0.2.7:1,http://192.0.2.7:1")
    with pytest.raises(DashboardError, match="the most is"):
        parse_peers(",".join(f"192.0.2.7:{port}" for port in range(1, MOST + 2)))


async def test_the_page_shows_nodes_and_nothing_of_a_run(elsewhere: Elsewhere, tmp_path: Path) -> None:
    addresses = [await elsewhere.start(HEALTH), await elsewhere.start({"hotkey": 7})]
    stop, ready = asyncio.Event(), asyncio.get_running_loop().create_future()
    task = asyncio.create_task(serve(None, host=HOST, port=0, ready=ready.set_result, stop=stop, peers=addresses))
    address = await ready
    try:
        async with aiohttp.ClientSession(address) as session:
            for path, status in (("/state?at=1", 400), ("/metrics", 404), ("/state", 200)):
                async with session.get(path) as answer:
                    assert answer.status == status
        if CHROMIUM is None:
            pytest.skip("no chromium on PATH (Debian: apt-get install chromium)")
        async with chromium(tmp_path / "profile") as page:
            await page.open(f"{address}/", width=360)
            shown = await page.evaluate("document.querySelector('main').innerText")
            assert "✓ answers" in shown
            assert "✕ what answers is no axon" in shown
            assert "Swarm" not in shown
            assert await page.evaluate("document.documentElement.scrollWidth <= innerWidth")
            assert page.trouble == []
    finally:
        stop.set()
        await task
