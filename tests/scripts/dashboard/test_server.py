"""The server gives fixed files and figures to whoever asks by this machine's name, and does nothing else."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import pytest

from neurons.telemetry import Validated
from scripts.dashboard.server import STATIC
from tests.scripts.dashboard.conftest import Served
from tests.scripts.dashboard.recording import BEGIN, small, write

Section = dict[str, object]


async def next_event(stream: aiohttp.StreamReader) -> tuple[str, dict[str, Section]]:
    """Kind and data of the next server-sent event."""
    while True:
        text = (await stream.readuntil(b"\n\n")).decode()
        if not text.startswith(":"):
            kind, data = text.rstrip().split("\n", 1)
            return kind.removeprefix("event: "), json.loads(data.removeprefix("data: "))


async def raw(address: str, request: str) -> tuple[str, str]:
    """Head and body of an answer to a request that a client library would not send."""
    parts = urlsplit(address)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    try:
        writer.write(request.encode())
        head, _, body = (await reader.read()).decode().partition("\r\n\r\n")
        return head, body
    finally:
        writer.close()
        await writer.wait_closed()


async def test_every_file_is_served_with_its_type_and_its_policy(recorded: Path, served: Served) -> None:
    async with served(recorded) as address, aiohttp.ClientSession(address) as session:
        paths = {"/": "text/html", **{f"/static/{name}": kind for name, kind in STATIC.items()}}
        for path, kind in paths.items():
            async with session.get(path) as answer:
                assert answer.status == 200
                assert answer.content_type == kind
                assert "default-src 'self'" in answer.headers["Content-Security-Policy"]
                assert answer.headers["X-Content-Type-Options"] == "nosniff"
                assert "access-control-allow-origin" not in answer.headers
                text = await answer.text()
                if "vendor" not in path and not path.endswith(".svg"):
                    assert "http://" not in text  # nothing comes from elsewhere
                    assert "https://" not in text


async def test_the_page_holds_no_inline_script_or_style(recorded: Path, served: Served) -> None:
    async with served(recorded) as address, aiohttp.ClientSession(address) as session, session.get("/") as answer:
        text = await answer.text()
        assert "<style" not in text
        assert "style=" not in text
        assert "onclick" not in text
        assert text.count("<script") == text.count("<script defer src=") + text.count('<script type="module" src=')


async def test_no_method_but_reading(recorded: Path, served: Served) -> None:
    async with served(recorded) as address, aiohttp.ClientSession(address) as session:
        for path in ("/", "/state", "/events", "/static/app.js"):
            for method in ("POST", "PUT", "PATCH", "DELETE", "OPTIONS"):
                async with session.request(method, path) as answer:
                    assert answer.status == 405, (method, path)
                    assert "Content-Security-Policy" in answer.headers
        async with session.head("/events") as answer:  # it would have no end
            assert answer.status == 405
        async with session.get("/stop") as answer:
            assert answer.status == 404


@pytest.mark.parametrize(
    "path",
    [
        "/static/../server.py",
        "/static/%2e%2e/server.py",
        "/static/..%2fserver.py",
        "/static/vendor/../../server.py",
        "/static//etc/passwd",
        "/static/%2fetc%2fpasswd",
        "/../../../etc/passwd",
        "/static/",
        "/manifest.toml",
        "/events/miner-0.jsonl",
    ],
)
async def test_no_other_file_is_served(recorded: Path, served: Served, path: str) -> None:
    async with served(recorded) as address:
        head, body = await raw(address, f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
        assert head.split()[1] in {"400", "404"}
        assert len(body) < 100


@pytest.mark.parametrize(
    ("host", "status"),
    [("127.0.0.1:8765", 200), ("localhost:1", 200), ("[::1]:8765", 200), ("evil.example", 403), ("", 403), ("a[", 403)],
)
async def test_a_name_that_is_not_this_machines_is_refused(
    recorded: Path, served: Served, host: str, status: int
) -> None:
    async with served(recorded) as address:
        head, _ = await raw(address, f"GET /state HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n")
        assert head.split()[1] == str(status)


async def test_state_now_and_at_a_moment(recorded: Path, served: Served) -> None:
    async with served(recorded) as address, aiohttp.ClientSession(address) as session:
        async with session.get("/state") as answer:
            now = await answer.json()
        assert (now["totals"]["microbatches"], now["run"]["status"]) == (20, "finished")
        async with session.get("/state", params={"at": BEGIN + 10.0}) as answer:
            then = await answer.json()
        assert (then["totals"]["microbatches"], then["run"]["status"]) == (7, "running")
        assert (then["run"]["at"], then["run"]["end"]) == (BEGIN + 10.0, BEGIN + 37.0)
        for query in ("at=nan", "at=x", "at=1&speed=0", "at=1&speed=inf", "at=1&speed=-2", "at="):
            for path in ("/state", "/events"):
                async with session.get(f"{path}?{query}") as answer:
                    assert answer.status == 400, query
                    assert len((await answer.text()).splitlines()) == 1


async def test_the_stream_begins_whole_and_then_sends_what_changes(tmp_path: Path, served: Served) -> None:
    story = small()
    write(tmp_path, story[:-10])
    async with served(tmp_path) as address, aiohttp.ClientSession(address) as session:
        async with session.get("/events") as answer:
            assert answer.content_type == "text/event-stream"
            kind, first = await next_event(answer.content)
            assert kind == "state"
            assert {"run", "totals", "grid", "curves", "rounds", "audits", "scores", "weights", "log"} == first.keys()
            write(tmp_path, [(50.0, "validator-0", Validated(1, 4.5, 8192))])
            _, second = await next_event(answer.content)
            assert second["totals"]["validation"] == 4.5
            assert "grid" not in second
            assert "scores" not in second
        async with session.get("/state") as answer:  # a page that has gone does no harm
            assert answer.status == 200


async def test_a_replay_tells_the_run_again_and_ends(recorded: Path, served: Served) -> None:
    async with (
        served(recorded) as address,
        aiohttp.ClientSession(address) as session,
        session.get("/events", params={"at": BEGIN + 10.0, "speed": 100.0}) as answer,
    ):
        kind, first = await next_event(answer.content)
        assert kind == "state"
        assert first["totals"]["microbatches"] in range(7, 21)
        seen = [first["run"]["at"]]
        while kind != "end":
            kind, news = await next_event(answer.content)
            if "run" in news:
                seen.append(news["run"]["at"])
        assert seen == sorted(seen)
        assert seen[-1] == BEGIN + 37.0
        assert not await answer.content.read()


async def test_streams_end_with_the_server(recorded: Path, served: Served) -> None:
    async with aiohttp.ClientSession() as session:
        async with served(recorded) as address:
            answer = await session.get(f"{address}/events")
            await next_event(answer.content)
        assert not await answer.content.read()
        answer.close()


async def test_more_pages_than_are_useful_are_refused(
    recorded: Path, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scripts.dashboard.server.STREAMS", 1)
    async with served(recorded) as address, aiohttp.ClientSession(address) as session, session.get("/events") as first:
        await next_event(first.content)
        async with session.get("/events") as second:
            assert second.status == 503
